"""The trainable state in flat buffers: masters, gradients, AdamW, schedule.

Rules: parameters of one learning rate lie one after the other in one float32 master, their gradients in one buffer
whose tail carries the step's loss and flags, so that a step needs one all-reduce, AdamW a handful of kernels and a
snapshot a handful of copies. The state is the same on every rank, bit for bit; nothing in it knows the world size.
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

_ALIGN = 64  # elements; every parameter starts on a cache line
_CLIP_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_


def learning_rate_factor(spec: TrainingSpec, step: int, num_steps: int) -> float:
    """Share of the peak learning rate at `step` (from 0); transformers' schedules, as functions of the step."""
    warmup = math.ceil(num_steps * spec.warmup_ratio)
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, num_steps - warmup)
    if spec.lr_scheduler == "cosine":
        return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    return max(0.0, 1 - progress) if spec.lr_scheduler == "linear" else 1.0


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies in its group's flat buffer."""

    name: str
    offset: int
    shape: tuple[int, ...]


@dataclass
class _Group:
    """Parameters of one learning rate."""

    key: str
    rate: float  # times the run's learning rate
    places: list[_Place]
    flat: nn.Parameter  # master weights, float32

    def view(self, flat: Tensor, place: _Place) -> Tensor:
        return flat[place.offset : place.offset + math.prod(place.shape)].view(place.shape)


class Optimizer:
    """AdamW over the trainable parameters, which become views of flat masters.

    `trainable` maps names to float32 parameters; those without requires_grad (LoRA-FA's A) stay as they are.
    Raises BadConfig when the chosen optimizer cannot work here.
    """

    NUM_FLAGS = 2  # prepare, stop

    def __init__(self, config: TrainConfig, trainable: Mapping[str, nn.Parameter], world_size: int) -> None:
        self.spec = config.spec.training
        learned = {name: parameter for name, parameter in trainable.items() if parameter.requires_grad}
        assert learned and all(parameter.dtype == torch.float32 for parameter in learned.values())
        device = next(iter(learned.values())).device
        _require_possible(self.spec.optimizer, world_size, device)
        self._groups = _group(learned, config.spec.lora.lora_plus_ratio)
        self.numel = sum(group.flat.numel() for group in self._groups)
        self._reduced = torch.zeros(self.numel + 1 + self.NUM_FLAGS, device=device)
        self.gradients, self._tail = self._reduced[: self.numel], self._reduced[self.numel :]
        self._attach(learned)
        self._adam = _build_adam(self.spec, self._groups)

    def _attach(self, learned: Mapping[str, nn.Parameter]) -> None:
        """Make each parameter a view of its master and its gradient a view of the gradient buffer."""
        start = 0
        for group in self._groups:
            flat_gradient = self.gradients[start : start + group.flat.numel()]
            group.flat.grad = flat_gradient
            for place in group.places:
                parameter = learned[place.name]
                master = group.view(group.flat.data, place)
                master.copy_(parameter.data)
                parameter.data = master
                parameter.grad = group.view(flat_gradient, place)
            start += group.flat.numel()

    def zero_grad(self) -> None:
        """Before the first micro batch of a step."""
        self._reduced.zero_()

    def add_loss(self, loss: Tensor) -> None:
        """Add a micro batch's share of the step's loss to what is all-reduced."""
        self._tail[0] += loss.detach()

    def set_flags(self, *flags: bool) -> None:
        """What this rank wants all ranks to know at the end of the step."""
        self._tail[1:] = torch.tensor(flags, dtype=torch.float32)

    def all_reduce(self) -> tuple[float, list[bool]]:
        """Sum gradients, loss and flags over all ranks in one collective; loss and flags raised by anyone."""
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._reduced)
        loss, *flags = self._tail.tolist()
        return loss, [flag > 0 for flag in flags]

    def step(self, step: int, num_steps: int) -> tuple[float, float]:
        """Clip by the global norm and update; (gradient norm before clipping, learning rate)."""
        norm = torch.linalg.vector_norm(self.gradients)
        if self.spec.max_grad_norm > 0:
            self.gradients.mul_((self.spec.max_grad_norm / (norm + _CLIP_EPSILON)).clamp(max=1.0))
        rate = self.spec.learning_rate * learning_rate_factor(self.spec, step, num_steps)
        for settings, group in zip(self._adam.param_groups, self._groups, strict=True):
            settings["lr"] = rate * group.rate
        self._adam.step()
        return norm.item(), rate

    def state(self) -> dict[str, Tensor]:
        """All that changes while training, flat, by name; the live tensors."""
        tensors = {}
        for group in self._groups:
            tensors[f"{group.key}.master"] = group.flat.data
            for name in _moments(self._adam.state[group.flat]):
                tensors[f"{group.key}.{name}"] = self._adam.state[group.flat][name]
        return tensors

    def load_state(self, state: Mapping[str, Tensor], num_updates: int) -> None:
        """Take over a state that `state()` gave after `num_updates` steps. ValueError when it is another model's."""
        live = self.state()
        if {n: t.shape for n, t in live.items()} != {n: t.shape for n, t in state.items()}:
            raise ValueError("the saved state does not fit this model and spec: it belongs to another run")
        for name, tensor in live.items():
            tensor.copy_(state[name])
        for group in self._groups:
            _set_updates(self._adam.state[group.flat], num_updates)

    def layout(self) -> dict[str, list[tuple[str, int, tuple[int, ...]]]]:
        """For each group name, offset (elements) and shape of its parameters: what is where in the flat state."""
        return {group.key: [(p.name, p.offset, p.shape) for p in group.places] for group in self._groups}


def _group(learned: Mapping[str, nn.Parameter], plus_ratio: float) -> list[_Group]:
    """B apart from the rest when LoRA+ (arXiv:2402.12354) gives it its own rate."""
    apart = {name for name in learned if plus_ratio != 1 and ".lora_B." in name}
    parts = [
        ("base", 1.0, [n for n in learned if n not in apart]),
        ("plus", plus_ratio, [n for n in learned if n in apart]),
    ]
    groups = []
    for key, rate, names in parts:
        if not names:
            continue
        places, offset = [], 0
        for name in names:
            places.append(_Place(name, offset, tuple(learned[name].shape)))
            offset += -(-learned[name].numel() // _ALIGN) * _ALIGN
        flat = nn.Parameter(torch.zeros(offset, device=learned[names[0]].device))
        groups.append(_Group(key, rate, places, flat))
    return groups


def _require_possible(name: str, world_size: int, device: torch.device) -> None:
    if name == "paged_adamw_8bit" and world_size > 1:
        raise BadConfig(
            "optimizer paged_adamw_8bit cannot be checkpointed when sharded (its state lives in CUDA managed memory):"
            " use adamw or adamw_8bit, or one GPU"
        )
    if name != "adamw" and device.type != "cuda":
        raise BadConfig(f"optimizer {name} needs a CUDA GPU: use adamw")


def _build_adam(spec: TrainingSpec, groups: list[_Group]) -> torch.optim.Optimizer:
    betas = (spec.adam_beta1, spec.adam_beta2)
    parameters: list[dict[str, Any]] = [{"params": [group.flat]} for group in groups]
    if spec.optimizer != "adamw":
        return _build_8bit(spec, parameters, betas)
    adam = torch.optim.AdamW(parameters, lr=spec.learning_rate, betas=betas, weight_decay=spec.weight_decay, fused=True)
    for group in groups:  # made now, not at the first step: a snapshot of step 0 has the same layout as any other
        flat = group.flat
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
