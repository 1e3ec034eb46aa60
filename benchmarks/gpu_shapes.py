"""Models of real shapes with random weights: Llama 8B on disk (safetensors), any size straight into packed bytes."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qlora_api.run import TrainConfig
from qlora_trainer.loader import PackedLayer, PackedModel
from qlora_trainer.quant import Scheme, Stored, Tables, align, place, read_tables
from qlora_trainer.skeleton import build_skeleton, decoder_layers, decoder_linears

SHAPES: dict[str, dict[str, int]] = {
    "8b": {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32},
    "70b": {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64},
    "tiny": {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8},
}


def llama_config(size: str, num_layers: int | None = None) -> Any:
    """Llama 3.1's configuration of that size."""
    from transformers import LlamaConfig

    shape = dict(SHAPES[size])
    if num_layers is not None:
        shape["num_hidden_layers"] = num_layers
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    vocabulary = 1024 if size == "tiny" else 128256
    return LlamaConfig(
        **shape,
        num_key_value_heads=8,
        vocab_size=vocabulary,
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        rope_parameters=rope,
        tie_word_embeddings=False,
        use_cache=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def write_checkpoint(folder: Path, size: str, num_files: int = 4) -> None:
    """A bf16 checkpoint of normal weights (0.02), made on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    config = llama_config(size)
    config.save_pretrained(folder)
    shapes = {name: p.shape for name, p in build_skeleton(config, torch.bfloat16).named_parameters()}
    names = list(shapes)
    parts = [names[i * len(names) // num_files : (i + 1) * len(names) // num_files] for i in range(num_files)]
    where = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{num_files:05d}.safetensors"
        tensors = {name: _weight(shapes[name], device).cpu() for name in part}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _weight(shape: torch.Size, device: str) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16, device=device)
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)


@dataclass(frozen=True)
class RandomPacked(PackedModel):
    """A packed model that exists nowhere: one layer's bytes, drawn once, stand for all."""

    device: torch.device

    def read_layer(self, index: int, start: int = 0, stop: int | None = None) -> Tensor:
        return self._blob[start:stop]

    def forget(self) -> None:
        """Give the drawn bytes' memory back."""
        self.__dict__.pop("_blob", None)

    @cached_property
    def _blob(self) -> Tensor:
        layer = self.layers[0]
        generator = torch.Generator(self.device).manual_seed(0)
        blob = torch.randint(0, 256, (layer.size,), dtype=torch.uint8, device=self.device, generator=generator)
        for stored in layer.linears.values():
            if self.scheme.type == "none":
                dense = blob[stored.codes[0] : sum(stored.codes)].view(self.scheme.dtype)
                dense.normal_(0, 0.02, generator=generator)
            elif self.scheme.double:
                blob[stored.absmax2[0] : sum(stored.absmax2)].view(torch.float32).fill_(0.01)
                blob[stored.mean[0] : sum(stored.mean)].view(torch.float32).fill_(0.03)
            else:
                blob[stored.absmax[0] : sum(stored.absmax)].view(torch.float32).fill_(0.03)
        return blob

    def read_rest(self, device: torch.device, on_host: str = "") -> dict[str, Tensor]:
        skeleton = build_skeleton(self.hf_config, self.scheme.dtype)
        linears = {f"{self.prefix}.{i}.{name}.weight" for i, name, _ in decoder_linears(skeleton)}
        shapes = {name: p.shape for name, p in skeleton.named_parameters() if name not in linears}
        place = {name: "cpu" if name == on_host else str(device) for name in shapes}
        return {name: _weight(shape, place[name]).to(self.scheme.dtype) for name, shape in shapes.items()}

    def read_tables(self, device: torch.device) -> Tables:
        return read_tables(self.scheme).to(device)


def random_packed(size: str, scheme: Scheme, device: torch.device, num_layers: int | None = None) -> RandomPacked:
    """A packed model of that shape with random bytes."""
    config = llama_config(size, num_layers)
    skeleton = build_skeleton(config, scheme.dtype)
    prefix, layers = decoder_layers(skeleton)
    linears: list[dict[str, Stored]] = [{} for _ in layers]
    for index, name, module in decoder_linears(skeleton):
        end = max((stored.end for stored in linears[index].values()), default=0)
        linears[index][name] = place(scheme, module.out_features, module.in_features, end)
    packed = [
        PackedLayer(f"layer-{i:05d}.bin", align(max(s.end for s in layer.values())), layer, (0, 0))
        for i, layer in enumerate(linears)
    ]
    return RandomPacked(Path("random"), f"random-{size}", prefix, scheme, packed, {}, config, False, device)


def train_config(**sections: dict[str, Any]) -> TrainConfig:
    """The benchmark's configuration: r = 16 on all linears, NF4 with double quantization, bf16."""
    spec: dict[str, Any] = {
        "model": {"uri": "file:///model"},
        "dataset": {"uri": "file:///data"},
        "output": {"uri": "s3://bucket/runs"},
        "lora": {"r": 16, "alpha": 32},
        "training": {"learning_rate": 1e-4, "max_length": 2048, "lr_scheduler": "constant", "warmup_ratio": 0},
    }
    for name, section in sections.items():
        spec[name] = {**spec.get(name, {}), **section}
    return TrainConfig.model_validate({"run": {"namespace": "bench", "name": "bench", "uid": "0"}, "spec": spec})


def words_tokenizer() -> Any:
    """A tokenizer that nobody calls: the samples are token ids already."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", "<pad>", *(f"t{i}" for i in range(1000))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
