"""Figures of a run: model FLOPs and a GPU's peak, the base's bytes, a GPU's memory.

Rules: a figure that cannot be had honestly is absent: no utilization on CPUs, in float32, on a slice of a GPU or on
one whose peak is not in the table.
"""

import re
from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_api.footprint import adapter_numel, shapes_of
from qlora_api.memory import Plan
from qlora_api.types import QLoRAFinetuneSpec
from qlora_trainer.model import TrainableModel
from qlora_trainer.sharding import own_part, peers_of

# Dense bfloat16 with float32 sums, FLOP/s, from NVIDIA's data sheets (half of what stands there "with sparsity"), by
# the whole name that the driver gives: a laptop's GPU or a slice (MIG) of one has another peak.
_PEAKS = {
    r"B200": 2250e12,
    r"H200|H100 80GB HBM3|H800|GH200 (480GB|144G HBM3e)": 989e12,
    r"H200 NVL|H100 NVL": 835e12,
    r"H100 PCIe": 756e12,
    r"A100-(SXM4|PCIE)-[48]0GB|A100 80GB PCIe|A800-SXM4-80GB|A800 80GB PCIe": 312e12,
    r"L40S": 362e12,
    r"L40": 181e12,
    r"A30": 165e12,
    r"GeForce RTX 4090": 165e12,
    r"A40": 149e12,
    r"A10": 125e12,
    r"L4": 121e12,
    r"GeForce RTX 3090": 71e12,
    r"A10G": 70e12,
}


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of dense bfloat16 products on this GPU (torch.cuda.get_device_name); None: not known."""
    found = (peak for names, peak in _PEAKS.items() if re.fullmatch(f"NVIDIA ({names})", device_name))
    return next(found, None)


def flops_per_token(spec: QLoRAFinetuneSpec, model_config: Mapping[str, Any], length: float) -> float:
    """Floating point operations that a step needs for a token of a sample of `length` tokens, a dense decoder's.

    As PaLM's model FLOPs (arXiv:2204.02311, appendix B: 2 forward and 4 backward for each weight, plus attention), less
    what a frozen base does not need: its weights' gradients. So 4 for each weight of the base's linears and the head
    (2 forward, 2 for the activations' gradients), 6 for each of the adapter, and three times the attention's products,
    of which a causal mask needs half. Recomputation, dequantization and the embedding lookup do not count.
    """
    shapes = shapes_of(model_config)
    layer = sum(rows * columns for rows, columns in shapes.linears.values())
    frozen = shapes.num_layers * layer + shapes.vocabulary * shapes.hidden
    attention = shapes.num_layers * 3 * 2 * shapes.query * length
    return 4 * frozen + 6 * adapter_numel(spec, shapes) + attention


def mean_length(lengths: "np.ndarray[Any, np.dtype[np.int64]]") -> float:
    """Tokens of the sample that the average token is in: attention grows with it."""
    total = float(lengths.sum())
    return float(np.square(lengths, dtype=np.float64).sum()) / total if total else 0.0


def base_bytes(model: TrainableModel) -> int:
    """Bytes of the base that this rank holds, as transformers' get_memory_footprint counts: parameters and buffers.

    Packed weights count as the bytes they are, with the quantization's scales, which transformers leaves out over
    bitsandbytes; adapters and gathered layers do not count.
    """
    own = sum(own_part(layer).nbytes for layer in model.layers)
    adapter = {id(parameter) for group in model.adapter.groups for parameter in group.parameters(recurse=False)}
    rest: chain[tuple[str, Tensor]] = chain(model.hf_model.named_parameters(), model.hf_model.named_buffers())
    held = (t for name, t in rest if not (name.endswith(".packed") or t.is_meta or id(t) in adapter))
    return own + sum(tensor.nbytes for tensor in held)


def planned(plan: Plan) -> dict[str, float]:
    """What the memory plan counts for a rank, to be seen beside what is measured."""
    gpu = {"planned_gpu_bytes": float(plan.gpu_bytes)} if plan.gpu_limit else {}
    return {**gpu, "planned_host_bytes": float(sum(plan.host.values()))}


class Utilization:
    """FLOP/s of a rank's model, and the share of its GPU's peak that they are."""

    def __init__(
        self, spec: QLoRAFinetuneSpec, hf_config: Any, lengths: Any, world_size: int, device: torch.device
    ) -> None:
        self._flops = flops_per_token(spec, hf_config.to_dict(), mean_length(lengths)) / world_size
        counts = device.type == "cuda" and spec.quantization.compute_dtype != "float32"
        self._peak = peak_flops(torch.cuda.get_device_name(device)) if counts else None

    def measures(self, tokens_per_second: float | None) -> dict[str, float]:
        """At this speed of the whole world."""
        if not tokens_per_second:
            return {}
        flops = self._flops * tokens_per_second
        return {"flops_per_second": flops, **({"mfu": flops / self._peak} if self._peak else {})}


class GpuMemory:
    """Bytes on this rank's GPU; nothing on a CPU. torch has one peak: what came before a save is kept here."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._peak = self._peak_of_save = 0
        self._saving = False

    def save_started(self) -> None:
        """From here on the peak is the save's, until it ended."""
        if self._on_gpu:
            self._peak = max(self._peak, torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()
            self._saving = True

    def save_ended(self) -> None:
        """Noticed at a step's end, so the step that it ended in counts."""
        if self._saving:
            self._peak_of_save, self._saving = torch.cuda.max_memory_allocated(), False

    def measures(self, model: TrainableModel) -> dict[str, float]:
        """After a step. A shard that peers have mapped is not in torch's counts and is added."""
        if not self._on_gpu:
            return {}
        peers = peers_of(model.layers[0])
        shard = peers.base.uncounted_bytes if peers is not None else 0
        self._peak = max(self._peak, torch.cuda.max_memory_reserved())
        found = {"gpu_memory_bytes": self._peak, "gpu_memory_steady_bytes": torch.cuda.memory_allocated()}
        if self._peak_of_save:
            found["gpu_memory_save_bytes"] = self._peak_of_save
        return {name: float(value + shard) for name, value in found.items()}
