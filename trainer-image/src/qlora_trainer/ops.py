"""One product for linears that share their input: y = x W^T + scale * drop(x) A^T B^T with W in 4 bits.

`qlora::linear` is a custom operator, so that torch.compile sees one opaque call and fuses everything around it. W is
dequantized in the forward and again in the backward pass and is never kept. The low-rank factors come twice: `a`, `b`
in the compute type for the products, `a_master`, `b_master` (float32) to receive the gradients.

Shapes: x (..., columns); W of the members stacked, (sum of rows, columns); A of the members with an adapter stacked,
(adapters * rank, columns); B likewise, (sum of their rows, rank). `xa` = scale * drop(x) A^T, (tokens, adapters * rank).
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from qlora_trainer.quant import Scheme, Stored, Tables, dequantize

recompute_skips_output = False  # set while a checkpoint recomputes: outputs that nobody saves need no product


@dataclass(frozen=True)
class GroupSpec:
    """What the operator has to know about a group; equal for the same linears of all layers."""

    members: tuple[Stored, ...]
    adapted: tuple[bool, ...]  # which members have an adapter
    scheme: Scheme
    rank: int
    scale: float
    dropout: float
    last: bool = False  # nothing in the layer saves this group's output for its backward pass

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(member.rows for member in self.members)

    @property
    def columns(self) -> int:
        return self.members[0].columns

    @property
    def num_adapters(self) -> int:
        return sum(self.adapted)

    def slices(self) -> list[tuple[int, slice, slice, slice]]:
        """Of every adapted member: its number, its columns in y, its rows in B, its columns in xa."""
        ends = list(accumulate(self.rows))
        result, b_end = [], 0
        for index, (rows, end, adapted) in enumerate(zip(self.rows, ends, self.adapted, strict=True)):
            if adapted:
                k = len(result)
                xa = slice(k * self.rank, (k + 1) * self.rank)
                result.append((index, slice(end - rows, end), slice(b_end, b_end + rows), xa))
                b_end += rows
        return result


_specs: list[tuple[GroupSpec, dict[torch.device, Tables], Tables]] = []


def register(spec: GroupSpec, tables: Tables) -> int:
    """The key under which the operator finds the spec: the same for equal specs."""
    for key, (known, _, _) in enumerate(_specs):
        if known == spec:
            return key
    _specs.append((spec, {}, tables))
    return len(_specs) - 1


def spec_of(key: int) -> GroupSpec:
    return _specs[key][0]


def _tables(key: int, device: torch.device) -> Tables:
    _, by_device, tables = _specs[key]
    if device not in by_device:
        by_device[device] = tables.to(device)
    return by_device[device]


def weight_of(blob: Tensor, key: int, dtype: torch.dtype) -> Tensor:
    """The group's dequantized weight, (sum of rows, columns), contiguous."""
    spec = spec_of(key)
    weight = torch.empty(sum(spec.rows), spec.columns, dtype=dtype, device=blob.device)
    tables = _tables(key, blob.device)
    start = 0
    for member in spec.members:
        dequantize(blob, member, spec.scheme, tables, weight[start : start + member.rows])
        start += member.rows
    return weight


@torch.library.custom_op("qlora::linear", mutates_args=())
def linear(
    x: Tensor,
    blob: Tensor,
    a: Tensor,
    b: Tensor,
    a_master: Tensor,
    b_master: Tensor,
    seeds: Tensor,
    key: int,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """(y, xa); `seeds` (2,) int64 = (step seed, group number) selects the dropout mask when `training`."""
    spec = spec_of(key)
    flat = x.reshape(-1, spec.columns)
    xa = _low_rank_input(flat, a, seeds, spec, training)
    shape = (*x.shape[:-1], sum(spec.rows))
    if recompute_skips_output and spec.last:
        return flat.new_empty(shape), xa
    weight = weight_of(blob, key, x.dtype)
    if x.is_cuda and all(spec.adapted):  # the thin products first: the wide one adds to them as it writes
        y = flat.new_empty(flat.shape[0], weight.shape[0])
        for _, rows, b_rows, k in spec.slices():
            torch.mm(xa[:, k], b[b_rows].t(), out=y[:, rows])
        return y.addmm_(flat, weight.t()).view(shape), xa
    y = flat @ weight.t()
    for _, rows, b_rows, k in spec.slices():
        y[:, rows].addmm_(xa[:, k], b[b_rows].t())
    return y.view(shape), xa


@linear.register_fake
def _(x, blob, a, b, a_master, b_master, seeds, key, training):  # type: ignore[no-untyped-def]
    spec = spec_of(key)
    xa = x.new_empty(x.numel() // spec.columns, spec.num_adapters * spec.rank)
    return x.new_empty(*x.shape[:-1], sum(spec.rows)), xa


@torch.library.custom_op("qlora::linear_backward", mutates_args=())
def linear_backward(
    dy: Tensor,
    x: Tensor,
    xa: Tensor,
    blob: Tensor,
    a: Tensor,
    b: Tensor,
    seeds: Tensor,
    key: int,
    training: bool,
    need_x: bool,
    need_a: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dA, dB); dA and dB are float32; what is not needed is empty."""
    spec = spec_of(key)
    dy = dy.reshape(-1, dy.shape[-1])
    flat = x.reshape(-1, spec.columns)
    dxa = torch.empty_like(xa)
    db = torch.empty(b.shape, dtype=torch.float32, device=b.device)
    for _, rows, b_rows, k in spec.slices():
        torch.mm(dy[:, rows], b[b_rows], out=dxa[:, k])
        db[b_rows] = _mm_float(dy[:, rows].t(), xa[:, k])
    dxa *= spec.scale
    dropped = bool(spec.dropout and training)
    da = _grad_a(dxa, flat, a, seeds, spec, dropped) if need_a else a.new_empty(0, dtype=torch.float32)
    if not need_x:
        return dy.new_empty(0), da, db
    if dropped:
        dx = torch.zeros_like(flat)
        for number, (_, _, _, k) in enumerate(spec.slices()):
            dx += drop(dxa[:, k] @ a[k], seeds, number, spec.dropout)
    else:
        dx = dxa @ a
    return dx.addmm_(dy, weight_of(blob, key, dy.dtype)).view(x.shape), da, db


def _grad_a(dxa: Tensor, x: Tensor, a: Tensor, seeds: Tensor, spec: GroupSpec, dropped: bool) -> Tensor:
    """dA, float32."""
    if not dropped:
        return _mm_float(dxa.t(), x)
    da = torch.empty(a.shape, dtype=torch.float32, device=a.device)
    for number, (_, _, _, k) in enumerate(spec.slices()):
        da[k] = _mm_float(dxa[:, k].t(), drop(x, seeds, number, spec.dropout))
    return da


def _mm_float(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32, without rounding to the inputs' type where the device can."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


@linear_backward.register_fake
def _(dy, x, xa, blob, a, b, seeds, key, training, need_x, need_a):  # type: ignore[no-untyped-def]
    dx = dy.new_empty(x.shape if need_x else (0,))
    da = a.new_empty(a.shape if need_a else (0,), dtype=torch.float32)
    return dx, da, b.new_empty(b.shape, dtype=torch.float32)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, blob, a, b, _, _, seeds, ctx.key, ctx.training = inputs
    ctx.save_for_backward(x, output[1], blob, a, b, seeds)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, _):  # type: ignore[no-untyped-def]
    x, xa, blob, a, b, seeds = ctx.saved_tensors
    need_x, need_a, need_b = ctx.needs_input_grad[0], ctx.needs_input_grad[4], ctx.needs_input_grad[5]
    dx, da, db = torch.ops.qlora.linear_backward(dy, x, xa, blob, a, b, seeds, ctx.key, ctx.training, need_x, need_a)
    grads = (dx if need_x else None, None, None, None, da if need_a else None, db if need_b else None)
    return (*grads, None, None, None)


linear.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("qlora::dropout", mutates_args=())
def dropout(x: Tensor, seeds: Tensor, number: int, probability: float) -> Tensor:
    """Inverted dropout whose mask is a function of (seeds, number) and the position in x."""
    return drop(x, seeds, number, probability)


@dropout.register_fake
def _(x, seeds, number, probability):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def _save_dropout(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, seeds, ctx.number, ctx.probability = inputs
    ctx.save_for_backward(seeds)


def _backward_dropout(ctx, dy):  # type: ignore[no-untyped-def]
    return torch.ops.qlora.dropout(dy, ctx.saved_tensors[0], ctx.number, ctx.probability), None, None, None


dropout.register_autograd(_backward_dropout, setup_context=_save_dropout)


def drop(x: Tensor, seeds: Tensor, number: int, probability: float) -> Tensor:
    """Inverted dropout of x with the mask of (step seed, group, member)."""
    if x.is_cuda:
        from qlora_trainer.kernels import dropout_cuda

        return dropout_cuda(x, seeds, number, probability)
    step_seed, group = seeds.tolist()
    generator = torch.Generator().manual_seed((step_seed * 1_000_003 + group * 64 + number) % 2**63)
    keep = torch.rand(x.shape, generator=generator) >= probability
    return x * keep / (1 - probability)


def _low_rank_input(x: Tensor, a: Tensor, seeds: Tensor, spec: GroupSpec, training: bool) -> Tensor:
    """scale * drop(x) A^T, (tokens, adapters * rank); each adapter has its own mask, as in PEFT."""
    if not (spec.dropout and training):
        return (x @ a.t()).mul_(spec.scale)
    xa = x.new_empty(x.shape[0], spec.num_adapters * spec.rank)
    for number, (_, _, _, k) in enumerate(spec.slices()):
        xa[:, k] = drop(x, seeds, number, spec.dropout) @ a[k].t()
    return xa.mul_(spec.scale)
