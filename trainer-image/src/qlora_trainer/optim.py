"""AdamW over the adapter's flat buffers, the schedule, and the one all-reduce of a step.

Rules: the optimizer sees the flat master, not its hundreds of parameters, so that a step is a handful of kernels and a
snapshot a handful of copies; loss and flags travel behind the gradients. The state is the same on every rank, bit for
bit, and nothing in it knows the world size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_api.run import TrainConfig
from qlora_api.types import TrainingSpec
from qlora_trainer.errors import BadConfig
from qlora_trainer.lora import NUM_EXTRA, Adapter

_CLIP_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_


def learning_rate_factor(spec: TrainingSpec, step: int, num_steps: int) -> float:
    """Share of the peak learning rate at `step` (from 0); transformers' schedules, as functions of the step.

    Other than there, at least one step is after the warm-up: a run of one step would learn nothing at rate 0.
    """
    warmup = min(math.ceil(num_steps * spec.warmup_ratio), num_steps - 1)
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, num_steps - warmup)
    if spec.lr_scheduler == "cosine":
        return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    return max(0.0, 1 - progress) if spec.lr_scheduler == "linear" else 1.0


@dataclass(frozen=True)
class _Span:
    """A stretch of the master buffer with one learning rate; `flat` and its gradient are views."""

    key: str
    rate: float  # times the run's learning rate
    flat: nn.Parameter


class Optimizer:
    """AdamW over an adapter's flat master. Raises BadConfig when the chosen optimizer cannot work here."""

    NUM_FLAGS = 3

    def __init__(self, config: TrainConfig, adapter: Adapter, world_size: int) -> None:
        assert 1 + self.NUM_FLAGS <= NUM_EXTRA
        self.spec = config.spec.training
        _require_possible(self.spec.optimizer, world_size, adapter.master.device)
        first = adapter.num_a if adapter.freeze_a else 0  # LoRA-FA: A comes first and has no gradient
        self._reduced = adapter.reduced[first : adapter.grad.numel() + 1 + self.NUM_FLAGS]
        self.gradients, self._tail = adapter.grad[first:], adapter.reduced[adapter.grad.numel() :]
        self._spans = _spans(adapter, first, config.spec.lora.lora_plus_ratio)
        self._adam = _build_adam(self.spec, self._spans)
        self._trained = adapter.master[first:]
        self._best = self._trained.clone() if self.spec.early_stopping_patience else None

    def zero_grad(self) -> None:
        """Before the first micro batch of a step."""
        self._reduced.zero_()

    def add_loss(self, loss: Tensor) -> None:
        """Add a micro batch's share of the step's loss to what is all-reduced."""
        self._tail[0] += loss.detach()

    def set_flags(self, *flags: bool) -> None:
        """What this rank wants all ranks to know at the end of the step."""
        self._tail[1 : 1 + self.NUM_FLAGS] = torch.tensor(flags, dtype=torch.float32)

    def all_reduce(self, divisor: int = 1) -> tuple[float, list[bool]]:
        """Sum gradients, loss and flags over all ranks in one collective; loss and flags raised by anyone.

        Gradients and loss are divided by `divisor` afterwards.
        """
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._reduced)
        if divisor != 1:
            self._reduced.div_(divisor)
        loss, *flags = self._tail[: 1 + self.NUM_FLAGS].tolist()
        return loss, [flag > 0 for flag in flags]

    def step(self, step: int, num_steps: int) -> tuple[float, float]:
        """Clip by the global norm and update; (gradient norm before clipping, learning rate)."""
        norm = torch.linalg.vector_norm(self.gradients)
        if self.spec.max_grad_norm > 0:
            self.gradients.mul_((self.spec.max_grad_norm / (norm + _CLIP_EPSILON)).clamp(max=1.0))
        rate = self.spec.learning_rate * learning_rate_factor(self.spec, step, num_steps)
        for settings, span in zip(self._adam.param_groups, self._spans, strict=True):
            settings["lr"] = rate * span.rate
        self._adam.step()
        return norm.item(), rate

    def keep_best(self) -> None:
        """Under early stopping: the present adapter is that of the best evaluation; kept as a part of `state`."""
        if self._best is not None:
            self._best.copy_(self._trained)

    def load_best(self) -> None:
        """Put the kept adapter in the place of the trained one, when training is over."""
        assert self._best is not None, "kept under early stopping only"
        self._trained.copy_(self._best)

    def state(self) -> dict[str, Tensor]:
        """All that changes while training, flat, by name; the live tensors."""
        tensors = {} if self._best is None else {"best.master": self._best}
        for span in self._spans:
            tensors[f"{span.key}.master"] = span.flat.data
            for name in _moments(self._adam.state[span.flat]):
                tensors[f"{span.key}.{name}"] = self._adam.state[span.flat][name]
        return tensors

    def load_state(self, state: Mapping[str, Tensor], num_updates: int) -> None:
        """Take over a state that `state()` gave after `num_updates` steps. ValueError when it is another model's."""
        live = self.state()
        if {n: t.shape for n, t in live.items()} != {n: t.shape for n, t in state.items()}:
            raise ValueError("the saved state does not fit this model and spec: it belongs to another run")
        for name, tensor in live.items():
            tensor.copy_(state[name])
        for span in self._spans:
            _set_updates(self._adam.state[span.flat], num_updates)


def _spans(adapter: Adapter, first: int, plus_ratio: float) -> list[_Span]:
    """One span, or three when LoRA+ (arXiv:2402.12354) gives B its own rate: A, B, DoRA's magnitudes."""
    end = adapter.master.numel()
    cuts = [("adapter", 1.0, first, end)]
    if plus_ratio != 1:
        num_b = sum(p.numel() for name, p in adapter.trainable.items() if ".lora_B." in name)
        end_b = adapter.num_a + num_b
        cuts = [("a", 1.0, first, adapter.num_a), ("b", plus_ratio, adapter.num_a, end_b), ("m", 1.0, end_b, end)]
    spans = []
    for key, rate, start, stop in cuts:
        if start < stop:
            flat = nn.Parameter(adapter.master[start:stop])
            flat.grad = adapter.grad[start:stop]
            spans.append(_Span(key, rate, flat))
    return spans


def _require_possible(name: str, world_size: int, device: torch.device) -> None:
    if name == "paged_adamw_8bit" and world_size > 1:
        raise BadConfig(
            "optimizer paged_adamw_8bit cannot be checkpointed when sharded (its state lives in CUDA managed memory):"
            " use adamw or adamw_8bit, or one GPU"
        )
    if name != "adamw" and device.type != "cuda":
        raise BadConfig(f"optimizer {name} needs a CUDA GPU: use adamw")


def _build_adam(spec: TrainingSpec, spans: list[_Span]) -> torch.optim.Optimizer:
    betas = (spec.adam_beta1, spec.adam_beta2)
    parameters: list[dict[str, Any]] = [{"params": [span.flat]} for span in spans]
    if spec.optimizer != "adamw":
        return _build_8bit(spec, parameters, betas)
    adam = torch.optim.AdamW(parameters, lr=spec.learning_rate, betas=betas, weight_decay=spec.weight_decay, fused=True)
    for span in spans:  # made now, not at the first step: a snapshot of step 0 has the same layout as any other
        flat = span.flat
        adam.state[flat] = {
            "step": torch.zeros((), device=flat.device),
            "exp_avg": torch.zeros_like(flat.data),
            "exp_avg_sq": torch.zeros_like(flat.data),
        }
    return adam


def _build_8bit(
    spec: TrainingSpec, parameters: list[dict[str, Any]], betas: tuple[float, float]
) -> torch.optim.Optimizer:
    import bitsandbytes as bnb

    kind = bnb.optim.PagedAdamW8bit if spec.optimizer.startswith("paged") else bnb.optim.AdamW8bit
    adam = kind(parameters, lr=spec.learning_rate, betas=betas, weight_decay=spec.weight_decay)
    adam.check_overrides()
    adam.initialized = True
    for index, settings in enumerate(adam.param_groups):
        adam.init_state(settings, settings["params"][0], index, 0)
    return adam  # type: ignore[no-any-return]


def _moments(state: Mapping[str, Any]) -> list[str]:
    """State tensors that change: not the step, not bitsandbytes' constant quantization maps."""
    return [
        name for name, value in state.items() if isinstance(value, Tensor) and name not in ("step", "qmap1", "qmap2")
    ]


def _set_updates(state: dict[str, Any], num_updates: int) -> None:
    if isinstance(state["step"], Tensor):
        state["step"].fill_(num_updates)
    else:
        state["step"] = num_updates
