"""The smallest real run: a Llama of one layer, a byte-level tokenizer, a few hundred sentences, a file:// bucket."""

import json
from pathlib import Path
from typing import Any

from qlora_api.run import RunIdentity, TrainConfig
from qlora_api.types import QLoRAFinetuneSpec

OUTPUT = "s3://replaced/below"  # real.py puts the worker's own URI in its place
_WORDS = "the quick brown fox jumps over a lazy dog while seven wise owls watch from old oak trees near rivers"


def make_sources(folder: Path, num_samples: int = 480) -> None:
    """`folder/model` and `folder/train.jsonl`; the same content every time."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**shape, num_key_value_heads=1, vocab_size=300, max_position_embeddings=64, eos_token_id=0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([_WORDS] * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.save_pretrained(folder / "model")
    lines = (json.dumps({"text": _sentence(number)}) + "\n" for number in range(num_samples))
    (folder / "train.jsonl").write_text("".join(lines))


def make_config(folder: Path, uid: str, num_steps: int, max_nodes: int, **spec: dict[str, Any]) -> TrainConfig:
    """A float32 run over what make_sources made; `spec` holds camelCase sections to merge in."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"uri": f"file://{folder}/model"},
        "dataset": {"uri": f"file://{folder}/train.jsonl"},
        "quantization": {"computeDtype": "float32", "storageDtype": "float32"},
        "lora": {"r": 4, "alpha": 8},
        "training": {
            "maxSteps": num_steps,
            "globalBatchSize": 3,
            "microBatchSize": 1,
            "maxLength": 32,
            "learningRate": 1e-3,
        },
        "checkpoint": {"intervalSteps": 10},
        "elasticPolicy": {"minNodes": 1, "maxNodes": max_nodes},
        "failurePolicy": {"maxFailures": 1000},
        "output": {"uri": OUTPUT},
    }
    for name, values in spec.items():
        sections[name] = {**sections.get(name, {}), **values}
    run = RunIdentity(namespace="default", name="chaos", uid=uid)
    return TrainConfig(run=run, spec=QLoRAFinetuneSpec.model_validate(sections))


def _sentence(number: int) -> str:
    words = _WORDS.split()
    return " ".join(words[(number * 7 + k * (1 + number % 5)) % len(words)] for k in range(4 + number % 12))
