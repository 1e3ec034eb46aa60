"""Model FLOPs, a GPU's peak and what a rank holds."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qlora_api.footprint import adapter_numel, shapes_of
from qlora_api.memory import plan
from qlora_trainer import measures
from qlora_trainer.measures import Utilization, flops_per_token, mean_length, peak_flops, planned

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
NUM_LINEAR = 8_030_261_248 - 128256 * 4096 - 65 * 4096  # all of Llama 3.1 8B but its embedding table and norms


def test_model_flops_are_palms_without_the_gradients_of_frozen_weights(make_config: Any) -> None:
    spec = make_config(lora={"r": 16}).spec
    adapter = adapter_numel(spec, shapes_of(LLAMA_8B))
    palm = 6 * (NUM_LINEAR + adapter) + 12 * 32 * 4096 * 2048 / 2  # half of the attention: it is causal
    assert flops_per_token(spec, LLAMA_8B, 2048) == palm - 2 * NUM_LINEAR


def test_the_average_token_is_in_a_long_sample() -> None:
    assert mean_length(np.array([10, 30])) == (10 * 10 + 30 * 30) / 40
    assert mean_length(np.array([], np.int64)) == 0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Some GPU", None),
    ],
)
def test_a_peak_is_known_or_absent(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


@pytest.mark.parametrize(
    ("name", "compute", "mfu"), [("NVIDIA H200", "bfloat16", True), ("NVIDIA H200", "float32", False), ("X", "", False)]
)
def test_utilization_is_a_share_of_a_known_peak(
    name: str, compute: str, mfu: bool, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    types = {"computeDtype": compute or "bfloat16", "storageDtype": compute or "bfloat16"}
    spec = make_config(quantization=types).spec
    monkeypatch.setattr(measures.torch.cuda, "get_device_name", lambda _: name)
    config = SimpleNamespace(to_dict=lambda: LLAMA_8B)
    found = Utilization(spec, config, np.array([2048]), 2, torch.device("cuda")).measures(30_000)
    each = flops_per_token(spec, LLAMA_8B, 2048) * 15_000
    assert found == {"flops_per_second": each, **({"mfu": each / 989e12} if mfu else {})}
    assert not mfu or 0.4 < found["mfu"] < 0.6


def test_a_cpu_has_speed_and_no_utilization(make_config: Any) -> None:
    config = SimpleNamespace(to_dict=lambda: LLAMA_8B)
    usage = Utilization(make_config().spec, config, np.array([8]), 1, torch.device("cpu"))
    assert usage.measures(1.0).keys() == {"flops_per_second"}
    assert usage.measures(None) == {}, "before the first step"


def test_a_plan_is_told_in_bytes(make_config: Any) -> None:
    spec = make_config().spec
    on_gpu = plan(spec, LLAMA_8B, 80 << 30, 2)
    assert planned(on_gpu) == {"planned_gpu_bytes": on_gpu.gpu_bytes, "planned_host_bytes": sum(on_gpu.host.values())}
    assert planned(plan(spec, LLAMA_8B, 0, 2)).keys() == {"planned_host_bytes"}
