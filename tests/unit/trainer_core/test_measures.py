"""Model FLOPs, a GPU's peak and what a rank holds."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.shapes import LLAMA_8B

from qlora_api.footprint import adapter_numel, shapes_of
from qlora_api.memory import plan
from qlora_trainer import measures
from qlora_trainer.measures import GpuMemory, Utilization, flops_per_token, mean_length, peak_flops, planned

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


class Allocator:
    """torch's counts of bytes, on a GPU and of its cache."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allocated = self.peak = self.reserved_peak = 0
        for name in ("memory_allocated", "max_memory_allocated", "max_memory_reserved", "reset_peak_memory_stats"):
            monkeypatch.setattr(measures.torch.cuda, name, getattr(self, name))

    def use(self, peak: int, then: int) -> None:
        self.peak, self.reserved_peak = max(self.peak, peak), max(self.reserved_peak, peak + 1)
        self.allocated = then

    def memory_allocated(self) -> int:
        return self.allocated

    def max_memory_allocated(self) -> int:
        return self.peak

    def max_memory_reserved(self) -> int:
        return self.reserved_peak

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.reserved_peak = self.allocated


def test_a_save_has_a_peak_of_its_own_and_the_runs_peak_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_counts, memory = Allocator(monkeypatch), GpuMemory(True)
    model: Any = SimpleNamespace(layers=[torch.nn.Module()])
    torch_counts.use(peak=900, then=100)
    assert memory.measures(model) == {"gpu_memory_bytes": 901, "gpu_memory_steady_bytes": 100}
    memory.save_ended()  # nothing was begun
    memory.save_started()
    torch_counts.use(peak=500, then=110)
    memory.save_ended()
    told = {"gpu_memory_bytes": 901, "gpu_memory_steady_bytes": 110, "gpu_memory_save_bytes": 500}
    assert memory.measures(model) == told
    torch_counts.use(peak=950, then=100)
    assert memory.measures(model) == {**told, "gpu_memory_bytes": 951, "gpu_memory_steady_bytes": 100}


def test_a_cpu_has_no_gpu_memory() -> None:
    memory = GpuMemory(False)
    memory.save_started()
    memory.save_ended()
    model: Any = None
    assert memory.measures(model) == {}
