"""The base's bytes as a rank holds them, against what transformers counts over bitsandbytes."""

from typing import Any

import pytest
import torch
from tests.sources import source_of
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_trainer.loader import ensure_packed
from qlora_trainer.measures import base_bytes
from qlora_trainer.model import build_model
from qlora_trainer.quant import ALIGNMENT

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2"])
@pytest.mark.parametrize("double", [False, True])
def test_the_base_is_as_large_as_transformers_says(
    family: str, double: bool, checkpoint: Any, config_of: Any, cache: Any
) -> None:
    config = config_of(quantization={"doubleQuant": double}, lora={"freezeA": True})
    packed = ensure_packed(config, source_of(checkpoint(family)), cache, CPU)
    model = build_model(config, packed, None, CPU, 1)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        checkpoint(family), quantization_config=quantization, dtype=torch.float32
    )
    stored = [linear for layer in packed.layers for linear in layer.linears.values()]
    scales = sum(size for s in stored for _, size in (s.absmax, s.absmax2, s.mean))  # no parameters: it leaves them out
    gaps = base_bytes(model) - theirs.get_memory_footprint() - scales
    assert 0 <= gaps <= 4 * ALIGNMENT * len(stored)
