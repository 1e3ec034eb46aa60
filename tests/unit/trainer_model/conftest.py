"""Tiny models of every tested family, as checkpoints on disk, and configurations for them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

from qlora_api.run import TrainConfig

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 64},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16, "sliding_window_pattern": 2},
    "phi": {},
    "phi3": {},
    "mixtral": {"num_local_experts": 4},
}


def build_config(compute: str = "float32", **sections: dict[str, Any]) -> TrainConfig:
    """A TrainConfig whose spec sections are updated by `sections`."""
    spec: dict[str, Any] = {
        "model": {"uri": "file:///model"},
        "dataset": {"uri": "file:///data"},
        "output": {"uri": "s3://bucket/runs"},
        "quantization": {"computeDtype": compute, "storageDtype": compute},
        "lora": {"r": 4, "alpha": 8},
    }
    for name, section in sections.items():
        spec[name] = {**spec.get(name, {}), **section}
    return TrainConfig.model_validate({"run": {"namespace": "n", "name": "r", "uid": "u"}, "spec": spec})


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """family -> folder of a tiny random checkpoint in safetensors."""
    made: dict[str, Path] = {}

    def make(family: str = "llama") -> Path:
        if family not in made:
            import torch
            from transformers import AutoConfig, AutoModelForCausalLM

            torch.manual_seed(1)
            config = AutoConfig.for_model(family.split("-")[0], **{**SIZES, **FAMILIES[family]})
            made[family] = tmp_path_factory.mktemp(family)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for parameter in model.parameters():  # biases and norms differ from their neutral values
                if parameter.ndim == 1:
                    parameter.data += 0.1 * torch.randn_like(parameter)
            model.save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def config_of() -> Callable[..., TrainConfig]:
    return build_config
