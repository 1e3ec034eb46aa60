"""One product for linears that share their input: y = x W^T + scale * drop(x) A^T B^T with W in 4 bits.

`qlora::linear` is a custom operator, so that torch.compile sees one opaque call and fuses everything around it. W is
dequantized in the forward and again in the backward pass and is never kept. The low-rank factors come twice: `a`, `b`
in the compute type for the products, `a_master`, `b_master` (float32) to receive the gradients. While it trains, the
adapter's share is added to the dequantized weights where that moves less than adding it to every token's output
(docs/decisions/0012); evaluation computes as PEFT does.

Shapes: x (..., columns); W of the members stacked, (sum of rows, columns); A of the members with an adapter stacked,
(adapters * rank, columns); B likewise, (sum of rows, rank); `xa` = scale * drop(x) A^T, (tokens, adapters * rank).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from qlora_trainer.groups import GroupSpec, Part, output_weights, spec_of
from qlora_trainer.quant import in_whole_blocks

recompute_skips_output = False  # set while a checkpoint recomputes: outputs that nobody saves need no product


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
        if _adds_to_weights(spec, flat, training, spec.columns):
            for y, weight in zip(outputs, output_weights(blob, key, x.dtype, (a, b)), strict=True):
                torch.mm(flat, weight.t(), out=y)
        else:
            _multiply(outputs, flat, output_weights(blob, key, x.dtype), xa, b, spec)
    return [*(y.view(*x.shape[:-1], y.shape[1]) for y in outputs), xa]


def _adds_to_weights(spec: GroupSpec, x: Tensor, training: bool, replaced: int) -> bool:
    """Whether scale * B A is added to the weights instead of its products to y or dx (docs/decisions/0012).

    `replaced`: columns of the weights in the forward pass, their adapted rows in the backward pass. So many numbers of
    weights are touched in place of as many tokens' numbers; one of the weights costs about half as much.
    """
    fits = in_whole_blocks(spec.scheme, spec.columns) and spec.num_adapters > 0 and spec.rank <= 64
    return fits and training and not spec.dropout and _on_hopper(x) and 2 * x.shape[0] >= replaced


def _on_hopper(x: Tensor) -> bool:
    """Whether the kernels serve whose tiles were chosen, and that were measured, on Hopper in bfloat16."""
    return x.is_cuda and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) == (9, 0)


def _multiply(
    outputs: list[Tensor], x: Tensor, weights: Iterator[Tensor], xa: Tensor, b: Tensor, spec: GroupSpec
) -> None:
    """outputs = x W^T + xa B^T; with adapters everywhere the thin products come first and the wide one adds to them."""
    thin_first = all(spec.adapted) and x.is_cuda
    if thin_first:
        for part in spec.parts:
            torch.mm(xa[:, part.xa], b[part.b_rows].t(), out=outputs[part.output][:, part.columns])
    for y, weight in zip(outputs, weights, strict=True):
        y.addmm_(x, weight.t()) if thin_first else torch.mm(x, weight.t(), out=y)
    if not thin_first:
        for part in spec.parts:
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
    dxa, db = _thin_gradients(dys, xa, b, spec)
    dropped = bool(spec.dropout and training)
    da = _grad_a(dxa, flat, a, seeds, spec, dropped) if need_a else a.new_empty(0, dtype=torch.float32)
    if not need_x:
        return x.new_empty(0), da, db
    if _adds_to_weights(spec, flat, training, b.shape[0]):
        dx, beta, factors = flat.new_empty(flat.shape), 0, (a, b)
    else:
        dx, beta, factors = _grad_x(dxa, flat, a, seeds, spec, dropped), 1, None
    for dy, weight in zip(dys, output_weights(blob, key, flat.dtype, factors), strict=True):
        dx.addmm_(dy, weight, beta=beta)
        beta = 1
    return dx.view(x.shape), da, db


def _thin_gradients(dys: list[Tensor], xa: Tensor, b: Tensor, spec: GroupSpec) -> tuple[Tensor, Tensor]:
    """(dxa = scale * dy B, side by side like xa; dB float32)."""
    dxa, db = torch.empty_like(xa), torch.empty(b.shape, dtype=torch.float32, device=b.device)
    for output, dy in enumerate(dys):
        parts = [part for part in spec.parts if part.output == output]
        if parts and _one_pass(dy, parts, spec.rank):
            _read_once(dy, xa, b, parts, spec.scale, dxa, db)
        else:
            for part in parts:
                mine = dy[:, part.columns]
                torch.mm(mine, b[part.b_rows], out=dxa[:, part.xa]).mul_(spec.scale)
                db[part.b_rows] = _mm_float(mine.t(), xa[:, part.xa])
    return dxa, db


def _read_once(dy: Tensor, xa: Tensor, b: Tensor, parts: list[Part], scale: float, dxa: Tensor, db: Tensor) -> None:
    """The parts of one output, by the kernel."""
    from qlora_trainer.kernels import adapter_gradients

    first, last = parts[0].b_rows.start, parts[-1].b_rows.stop
    members = [(p.columns.start, p.b_rows.start - first, p.columns.stop - p.columns.start, p.xa.start) for p in parts]
    adapter_gradients(dy, b[first:last], xa, members, scale, dxa, db[first:last])


def _one_pass(dy: Tensor, parts: list[Part], rank: int) -> bool:
    """Whether the kernel that reads dy once serves."""
    aligned = all(p.columns.start % 16 == p.columns.stop % 16 == p.b_rows.start % 16 == 0 for p in parts)
    straight = dy.stride(1) == 1 and dy.stride(0) % 16 == 0
    return _on_hopper(dy) and rank <= 32 and aligned and straight


def _grad_x(dxa: Tensor, x: Tensor, a: Tensor, seeds: Tensor, spec: GroupSpec, dropped: bool) -> Tensor:
    """The adapters' share of dx."""
    if not dropped:
        return dxa @ a
    dx = torch.zeros_like(x)
    for number, part in enumerate(spec.parts):
        dx += drop(dxa[:, part.xa] @ a[part.xa], seeds, number, spec.dropout)
    return dx


def _grad_a(dxa: Tensor, x: Tensor, a: Tensor, seeds: Tensor, spec: GroupSpec, dropped: bool) -> Tensor:
    """dA, float32."""
    if not dropped:
        return _mm_float(dxa.t(), x)
    da = torch.empty(a.shape, dtype=torch.float32, device=a.device)
    for number, part in enumerate(spec.parts):
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
    for number, part in enumerate(spec.parts):
        xa[:, part.xa] = drop(x, seeds, number, spec.dropout) @ a[part.xa].t()
    return xa.mul_(spec.scale)
