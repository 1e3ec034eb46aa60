"""The adapter: its parameters in two flat buffers, and the linears that use it.

Rules: masters and gradients are float32 and lie in one buffer each (all A, then all B, then DoRA's magnitudes), so that
one copy refreshes the working copies and one all-reduce sums the gradients; every initial value is a function of
(seed, name). Linears that share an input are one `Group`: the first of them to be called computes the product of all.
"""

import hashlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qlora_trainer.groups import GroupSpec, register, weight_of
from qlora_trainer.ops import linear
from qlora_trainer.quant import Tables

PEFT_PREFIX = "base_model.model."  # of every module's path in PEFT's names
NUM_EXTRA = 8  # numbers behind the gradients that a step all-reduces with them (loss, flags)


@dataclass(frozen=True)
class GroupPlan:
    """A group before it has parameters: where it is, which linears, what the operator needs."""

    layer: int
    path: str  # of the decoder layer, such as model.layers.0
    names: tuple[str, ...]  # of the linears, within the layer
    spec: GroupSpec


class LayerState:
    """What the linears of one layer share while it runs: the whole layer's bytes."""

    blob: Tensor | None = None


class Group(nn.Module):
    """Linears with one input. `a_master` and `b_master` are float32 leaves, `a` and `b` their working copies."""

    a_master: nn.Parameter
    b_master: nn.Parameter
    magnitude: nn.Parameter  # DoRA only
    a: Tensor
    b: Tensor
    seeds: Tensor

    def __init__(self, plan: GroupPlan, tables: Tables, dtype: torch.dtype, state: LayerState, dora: bool) -> None:
        super().__init__()
        self.plan, self.dtype, self.state, self.dora = plan, dtype, state, dora
        bare = replace(plan.spec, adapted=(False,) * len(plan.spec.members), dropout=0.0)
        self.key = register(bare if dora else plan.spec, tables)
        device = tables.code4.device
        empty = torch.zeros(0, plan.spec.columns, device=device), torch.zeros(0, plan.spec.rank, device=device)
        self.nothing = (*(factor.to(dtype) for factor in empty), *empty)
        self.rows = list(plan.spec.rows)
        self.pending: tuple[Tensor, list[Tensor | None]] | None = None

    def product(self, x: Tensor) -> list[Tensor]:
        """Base and adapter, (..., rows) of every member."""
        assert self.state.blob is not None, "the layer is not gathered"
        factors = self.nothing if self.dora else (self.a, self.b, self.a_master, self.b_master)
        outputs = linear(x.to(self.dtype), self.state.blob, *factors, self.seeds, self.key, self.training)[:-1]
        return list(outputs) if len(outputs) == len(self.rows) else list(outputs[0].split(self.rows, -1))

    def member(self, index: int, x: Tensor) -> Tensor:
        """Member `index` applied to x; its siblings, called next with the same x, find theirs ready."""
        if len(self.rows) == 1:
            return self.product(x)[0]
        if self.pending is None or self.pending[0] is not x or self.pending[1][index] is None:
            self.pending = (x, [*self.product(x)])
        parts = self.pending[1]
        result = parts[index]
        assert result is not None
        parts[index] = None
        if all(part is None for part in parts):
            self.pending = None
        return result


class QuantLinear(nn.Module):
    """Takes a linear's place: member `index` of its group, plus the linear's own bias."""

    def __init__(self, group: Group, index: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._group = (group,)  # in a tuple: the layer registers the group, once
        self.index = index
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        y = self._group[0].member(self.index, x)
        return y if self.bias is None else y + self.bias


class DoraLinear(nn.Module):
    """DoRA (arXiv:2402.09353): magnitude / ||W + scale B A|| times the adapted product, as PEFT computes it."""

    def __init__(self, group: Group, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._group = (group,)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        group = self._group[0]
        spec = group.plan.spec
        y = group.product(x)[0]
        dropped = x
        if spec.dropout and self.training:
            dropped = torch.ops.qlora.dropout(x, group.seeds, 0, spec.dropout)
        a, b = group.a_master.to(x.dtype), group.b_master.to(x.dtype)
        delta = spec.scale * ((dropped @ a.t()) @ b.t())
        factor = (group.magnitude / self._norm(group)).to(x.dtype)
        base = group.product(dropped)[0] if dropped is not x else y
        result = y + (factor - 1) * base + factor * delta
        return result if self.bias is None else result + self.bias

    @staticmethod
    @torch.no_grad()
    def _norm(group: Group) -> Tensor:
        """Row norms of W + scale B A, float32; a constant for the gradient, as in the paper's section 4.3."""
        assert group.state.blob is not None
        weight = weight_of(group.state.blob, group.key, group.dtype).float()
        weight.addmm_(group.b_master, group.a_master, alpha=group.plan.spec.scale)
        norms: Tensor = weight.norm(dim=1)
        return norms


class Adapter:
    """All trainable tensors. `trainable` maps PEFT's names to float32 parameters that are views of `master`."""

    def __init__(
        self, groups: list[Group], device: torch.device, dtype: torch.dtype, seed: int, freeze_a: bool, dora: bool
    ) -> None:
        self.groups, self.dtype, self.freeze_a, self.dora = groups, dtype, freeze_a, dora
        adapted = [group for group in groups if group.plan.spec.num_adapters]
        sizes_a = [(g.plan.spec.num_adapters * g.plan.spec.rank, g.plan.spec.columns) for g in adapted]
        sizes_b = [(sum(_adapted_rows(g.plan.spec)), g.plan.spec.rank) for g in adapted]
        sizes_m = [(rows,) for g in adapted for rows in _adapted_rows(g.plan.spec)] if dora else []
        shapes: list[tuple[int, ...]] = [*sizes_a, *sizes_b, *sizes_m]
        self.num_a = sum(math.prod(shape) for shape in sizes_a)
        numel = sum(math.prod(shape) for shape in shapes)
        self.master = torch.zeros(numel, dtype=torch.float32, device=device)
        self.reduced = torch.zeros(numel + NUM_EXTRA, dtype=torch.float32, device=device)
        self.grad = self.reduced[:numel]
        self.work = self.master if dtype == torch.float32 else torch.zeros(numel, dtype=dtype, device=device)
        self.trainable: dict[str, nn.Parameter] = {}
        self.frozen: dict[str, Tensor] = {}
        self._views: list[tuple[nn.Parameter, Tensor]] = []
        self._attach(adapted, shapes)
        for group in groups:
            if not group.plan.spec.num_adapters:
                _attach_nothing(group, device, dtype)
        self.reset(seed)

    def _attach(self, adapted: list[Group], shapes: list[tuple[int, ...]]) -> None:
        masters, grads, works = (_views(flat, shapes) for flat in (self.master, self.grad, self.work))
        count = len(adapted)
        for i, group in enumerate(adapted):
            group.a_master = _leaf(masters[i], grads[i], not self.freeze_a)
            group.b_master = _leaf(masters[count + i], grads[count + i], True)
            group.a, group.b = works[i], works[count + i]
            if self.dora:
                group.magnitude = _leaf(masters[2 * count + i], grads[2 * count + i], True)
            self._name(group, masters[i], grads[i], masters[count + i], grads[count + i])

    def _name(self, group: Group, a: Tensor, a_grad: Tensor, b: Tensor, b_grad: Tensor) -> None:
        names = [name for name, adapted in zip(group.plan.names, group.plan.spec.adapted, strict=True) if adapted]
        for name, part in zip(names, group.plan.spec.parts, strict=True):
            path = f"{PEFT_PREFIX}{group.plan.path}.{name}"
            rows, k = part.b_rows, part.xa
            if self.freeze_a:
                self.frozen[f"{path}.lora_A.weight"] = a[k]
            else:
                self._expose(f"{path}.lora_A.weight", a[k], a_grad[k])
            self._expose(f"{path}.lora_B.weight", b[rows], b_grad[rows])
            if self.dora:
                magnitude = group.magnitude
                assert magnitude.grad is not None
                self._expose(f"{path}.lora_magnitude_vector", magnitude.data, magnitude.grad)

    def _expose(self, name: str, value: Tensor, grad: Tensor) -> None:
        parameter = nn.Parameter(value)
        parameter.grad = grad
        self.trainable[name] = parameter
        self._views.append((parameter, grad))

    def reset(self, seed: int) -> None:
        """As before the first step; DoRA's magnitudes are to be measured anew."""
        self.master.zero_()
        self.reduced.zero_()
        for group in self.groups:
            group.pending = None
        self._initialize(seed)
        self.refresh()

    @torch.no_grad()
    def _initialize(self, seed: int) -> None:
        """A: uniform in +-1/sqrt(columns) (Kaiming with a = sqrt 5, as PEFT), B: zero; drawn on the CPU by name."""
        for name, value in [*self.trainable.items(), *self.frozen.items()]:
            if name.endswith("lora_A.weight"):
                digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
                bound = 1 / math.sqrt(value.shape[1])
                value.copy_(torch.empty(value.shape).uniform_(-bound, bound, generator=generator))

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the working copies up to the masters, and give back `.grad` to parameters that lost it (zeroed)."""
        if self.work is not self.master:
            self.work.copy_(self.master)
        if any(parameter.grad is None for parameter, _ in self._views):
            self.grad.zero_()
            for parameter, grad in self._views:
                parameter.grad = grad


def _adapted_rows(spec: GroupSpec) -> list[int]:
    return [rows for rows, adapted in zip(spec.rows, spec.adapted, strict=True) if adapted]


def _views(flat: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _leaf(value: Tensor, grad: Tensor, trains: bool) -> nn.Parameter:
    parameter = nn.Parameter(value, requires_grad=trains)
    parameter.grad = grad if trains else None
    return parameter


def _attach_nothing(group: Group, device: torch.device, dtype: torch.dtype) -> None:
    """A group without adapter: empty factors."""
    group.a_master = nn.Parameter(torch.zeros(0, group.plan.spec.columns, device=device), requires_grad=False)
    group.b_master = nn.Parameter(torch.zeros(0, group.plan.spec.rank, device=device), requires_grad=False)
    group.a, group.b = group.a_master.to(dtype), group.b_master.to(dtype)
