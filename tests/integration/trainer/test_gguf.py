"""A GGUF file is converted once into safetensors, tensor for tensor, and trained on like any other model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file
from tests.integration.trainer.test_card import assert_card_works
from transformers import LlamaConfig

from qlora_trainer.sources import ensure_model

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def gguf_name(name: str) -> str:
    parts = name.split(".")
    if parts[1] == "layers":
        return f"blk.{parts[2]}.{NAMES['.'.join(parts[3:])]}"
    return NAMES[name]


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of the rotary halves."""
    return weight.view(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def write_gguf(base: Path, path: Path) -> None:
    """A safetensors Llama as llama.cpp's converter would write it, in float32."""
    config = LlamaConfig.from_pretrained(base)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokenizer = json.loads((base / "tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(sorted(tokenizer["vocab"], key=tokenizer["vocab"].get))
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["merges"]])
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(1)
    for name, tensor in load_file(base / "model.safetensors").items():
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        rotary = "q_proj" in name or "k_proj" in name
        value = permuted(tensor.float(), heads) if rotary else tensor.float()
        writer.add_tensor(gguf_name(name), value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_is_converted_once_and_trained_on(make_world: Callable[..., Any], model_dir: Path, tmp_path: Path) -> None:
    write_gguf(model_dir, tmp_path / "base.gguf")
    world = make_world("gguf", model={"uri": f"file://{tmp_path}/base.gguf"}, training={"maxSteps": 2})
    source = ensure_model(world.config, world.env(0))
    original, converted = (load_file(folder / "model.safetensors") for folder in (model_dir, source.path))
    assert converted.keys() == original.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in original.items())
    stamp = (source.path / "model.safetensors").stat().st_mtime_ns
    assert world.run([0, 1]) == [0, 0]
    assert (source.path / "model.safetensors").stat().st_mtime_ns == stamp, "converted once"
    assert_card_works(world, tmp_path / "user")
