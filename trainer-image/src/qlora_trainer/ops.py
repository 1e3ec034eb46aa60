"""One product for linears that share their input: y = x W^T + scale * drop(x) A^T B^T with W in 4 bits.

`qlora::linear` is a custom operator, so that torch.compile sees one opaque call and fuses everything around it. W is
dequantized in the forward and again in the backward pass and is never kept. The low-rank factors come twice: `a`, `b`
in the compute type for the products, `a_master`, `b_master` (float32) to receive the gradients.

Shapes: x (..., columns); W of the members stacked, (sum of rows, columns); A of the members with an adapter stacked,
(adapters * rank, columns); B likewise, (sum of rows, rank); `xa` = scale * drop(x) A^T, (tokens, adapters * rank).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from qlora_trainer.quant import Scheme, Stored, Tables, dequantize

recompute_skips_output = False  # set while a checkpoint recomputes: outputs that nobody saves need no product


@dataclass(frozen=True)
class Part:
    """Where one adapted member's numbers are: output and its columns, rows of B, columns of xa."""

    output: int
    columns: slice
    b_rows: slice
    xa: slice


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

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of every output: one output for all members, or one each where they are wide.

        Narrow members gain by one product; of wide ones (gate and up) the gradients would have to be put side by side.
        """
        return self.rows if min(self.rows) > self.columns else (sum(self.rows),)

    def parts(self) -> list[Part]:
        """Of every adapted member."""
        separate = len(self.widths) == len(self.rows)
        result, b_end = list[Part](), 0
        for index, (rows, end, adapted) in enumerate(zip(self.rows, accumulate(self.rows), self.adapted, strict=True)):
            if adapted:
                xa = slice(len(result) * self.rank, (len(result) + 1) * self.rank)
                output, columns = (index, slice(0, rows)) if separate else (0, slice(end - rows, end))
                result.append(Part(output, columns, slice(b_end, b_end + rows), xa))
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


def weight_of(blob: Tensor, key: int, dtype: torch.dtype, members: slice = slice(None)) -> Tensor:
    """The members' dequantized weights stacked, (sum of rows, columns), contiguous; unquantized ones are not copied."""
    spec = spec_of(key)
    stored = spec.members[members]
    starts, ends = [s.codes[0] for s in stored], [s.end for s in stored]
    if spec.scheme.type == "none" and spec.scheme.dtype == dtype and starts[1:] == ends[:-1]:
        return blob[starts[0] : ends[-1]].view(dtype).view(-1, spec.columns)
    weight = torch.empty(sum(s.rows for s in stored), spec.columns, dtype=dtype, device=blob.device)
    tables = _tables(key, blob.device)
    start = 0
    for member in stored:
        dequantize(blob, member, spec.scheme, tables, weight[start : start + member.rows])
        start += member.rows
    return weight


def _weights(blob: Tensor, key: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The weight of every output, one at a time: no more than one of them needs memory."""
    if len(spec_of(key).widths) == 1:
        yield weight_of(blob, key, dtype)
        return
    for index in range(len(spec_of(key).members)):
        yield weight_of(blob, key, dtype, slice(index, index + 1))


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
) -> list[Tensor]:
    """[*outputs, xa]; `seeds` (2,) int64 = (step seed, group number) selects the dropout mask when `training`."""
    spec = spec_of(key)
    flat = x.reshape(-1, spec.columns)
    xa = _low_rank_input(flat, a, seeds, spec, training)
    outputs = [flat.new_empty(flat.shape[0], width) for width in spec.widths]
    if not (recompute_skips_output and spec.last):
        _multiply(outputs, flat, _weights(blob, key, x.dtype), xa, b, spec)
    return [*(y.view(*x.shape[:-1], y.shape[1]) for y in outputs), xa]


def _multiply(
    outputs: list[Tensor], x: Tensor, weights: Iterator[Tensor], xa: Tensor, b: Tensor, spec: GroupSpec
) -> None:
    """outputs = x W^T + xa B^T; with adapters everywhere the thin products come first and the wide one adds to them."""
    thin_first = all(spec.adapted) and x.is_cuda
    if thin_first:
        for part in spec.parts():
            torch.mm(xa[:, part.xa], b[part.b_rows].t(), out=outputs[part.output][:, part.columns])
    for y, weight in zip(outputs, weights, strict=True):
        y.addmm_(x, weight.t()) if thin_first else torch.mm(x, weight.t(), out=y)
    if not thin_first:
        for part in spec.parts():
            outputs[part.output][:, part.columns].addmm_(xa[:, part.xa], b[part.b_rows].t())


@linear.register_fake
def _(x, blob, a, b, a_master, b_master, seeds, key, training):  # type: ignore[no-untyped-def]
    spec = spec_of(key)
    xa = x.new_empty(x.numel() // spec.columns, spec.num_adapters * spec.rank)
    return [*(x.new_empty(*x.shape[:-1], width) for width in spec.widths), xa]


@torch.library.custom_op("qlora::linear_backward", mutates_args=())
def linear_backward(
    gradients: list[Tensor],
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
    """(dx, dA, dB) from the outputs' gradients; dA and dB are float32; what is not needed is empty."""
    spec = spec_of(key)
    dys = [dy.reshape(-1, dy.shape[-1]) for dy in gradients]
    flat = x.reshape(-1, spec.columns)
    dxa = torch.empty_like(xa)
    db = torch.empty(b.shape, dtype=torch.float32, device=b.device)
    for part in spec.parts():
        dy = dys[part.output][:, part.columns]
        torch.mm(dy, b[part.b_rows], out=dxa[:, part.xa])
        db[part.b_rows] = _mm_float(dy.t(), xa[:, part.xa])
    dxa *= spec.scale
    dropped = bool(spec.dropout and training)
    da = _grad_a(dxa, flat, a, seeds, spec, dropped) if need_a else a.new_empty(0, dtype=torch.float32)
    if not need_x:
        return x.new_empty(0), da, db
    dx = _grad_x(dxa, flat, a, seeds, spec, dropped)
    for dy, weight in zip(dys, _weights(blob, key, flat.dtype), strict=True):
        dx.addmm_(dy, weight)
    return dx.view(x.shape), da, db


def _grad_x(dxa: Tensor, x: Tensor, a: Tensor, seeds: Tensor, spec: GroupSpec, dropped: bool) -> Tensor:
    """The adapters' share of dx."""
    if not dropped:
        return dxa @ a
    dx = torch.zeros_like(x)
    for number, part in enumerate(spec.parts()):
        dx += drop(dxa[:, part.xa] @ a[part.xa], seeds, number, spec.dropout)
    return dx


def _grad_a(dxa: Tensor, x: Tensor, a: Tensor, seeds: Tensor, spec: GroupSpec, dropped: bool) -> Tensor:
    """dA, float32."""
    if not dropped:
        return _mm_float(dxa.t(), x)
    da = torch.empty(a.shape, dtype=torch.float32, device=a.device)
    for number, part in enumerate(spec.parts()):
        da[part.xa] = _mm_float(dxa[:, part.xa].t(), drop(x, seeds, number, spec.dropout))
    return da


def _mm_float(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32, without rounding to the inputs' type where the device can."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


@linear_backward.register_fake
def _(gradients, x, xa, blob, a, b, seeds, key, training, need_x, need_a):  # type: ignore[no-untyped-def]
    dx = x.new_empty(x.shape if need_x else (0,))
    da = a.new_empty(a.shape if need_a else (0,), dtype=torch.float32)
    return dx, da, b.new_empty(b.shape, dtype=torch.float32)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, blob, a, b, _, _, seeds, ctx.key, ctx.training = inputs
    ctx.save_for_backward(x, output[-1], blob, a, b, seeds)


def _backward(ctx, gradients):  # type: ignore[no-untyped-def]
    x, xa, blob, a, b, seeds = ctx.saved_tensors
    need_x, need_a, need_b = ctx.needs_input_grad[0], ctx.needs_input_grad[4], ctx.needs_input_grad[5]
    dx, da, db = torch.ops.qlora.linear_backward(
        gradients[:-1], x, xa, blob, a, b, seeds, ctx.key, ctx.training, need_x, need_a
    )
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
    for number, part in enumerate(spec.parts()):
        xa[:, part.xa] = drop(x, seeds, number, spec.dropout) @ a[part.xa].t()
    return xa.mul_(spec.scale)
