"""Triton kernels: dequantization bit-identical to bitsandbytes, an adapter's gradients, dropout by its seeds.

Rules: products and sums of scales are rounded one by one (no fused multiply-add), as in bitsandbytes' two kernels, but
where an adapter's share is added: there the sum is rounded once. Sums over programs have one order, so that a repeated
step has the same bits.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_trainer.quant import BLOCK, BLOCK2, LowRank, Tables

_BYTES = 2048  # codes a program dequantizes: 4,096 elements, 64 scales
_ROWS, _COLUMNS = 32, 128  # of the tile that a program dequantizes and adds an adapter's share to
_PROGRAMS, _WIDTH = 128, 64  # of an adapter's gradients: about one program per multiprocessor; columns of dy at a time

Member = tuple[int, int, int, int]  # see adapter_gradients


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize(  # type: ignore[no-untyped-def] # a kernel's parameters have no Python types
    codes, absmax, absmax2, mean, code4, code8, out, num_codes, numel,
    DOUBLE: tl.constexpr, BYTES: tl.constexpr, BLOCK: tl.constexpr, BLOCK2: tl.constexpr,
):  # fmt: skip
    """One program: BYTES codes -> 2 * BYTES elements of `out`."""
    SCALES: tl.constexpr = BYTES * 2 // BLOCK
    program = tl.program_id(0).to(tl.int64)
    block = program * SCALES + tl.arange(0, SCALES)
    inside = block * BLOCK < numel
    if DOUBLE:
        fine = tl.load(code8 + tl.load(absmax + block, mask=inside, other=0).to(tl.int32))
        scale = fine * tl.load(absmax2 + block // BLOCK2, mask=inside, other=0.0) + tl.load(mean)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    at = program * BYTES + tl.arange(0, BYTES)
    byte = tl.load(codes + at, mask=at < num_codes, other=0).to(tl.int32)
    high = tl.reshape(tl.load(code4 + (byte >> 4)), (SCALES, BLOCK // 2)) * scale[:, None]
    low = tl.reshape(tl.load(code4 + (byte & 15)), (SCALES, BLOCK // 2)) * scale[:, None]
    values = tl.reshape(tl.interleave(high, low), (BYTES * 2,))
    to = program * BYTES * 2 + tl.arange(0, BYTES * 2)
    tl.store(out + to, values.to(out.dtype.element_ty), mask=to < numel)


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize_adapted(  # type: ignore[no-untyped-def]
    codes, absmax, absmax2, mean, code4, code8, a, b, out, rows, columns, factor,
    DOUBLE: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK2: tl.constexpr,
):  # fmt: skip
    """One program: a tile of weight + factor * B A; `columns` is a multiple of BLOCK."""
    SCALES: tl.constexpr = COLUMNS // BLOCK
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    strip, known = tl.program_id(1), row < rows
    block = (strip * SCALES + tl.arange(0, SCALES))[None, :]
    at, inside = row * (columns // BLOCK) + block, known & (block < columns // BLOCK)
    if DOUBLE:
        fine = tl.load(code8 + tl.load(absmax + at, mask=inside, other=0).to(tl.int32))
        scale = fine * tl.load(absmax2 + at // BLOCK2, mask=inside, other=0.0) + tl.load(mean)
    else:
        scale = tl.load(absmax + at, mask=inside, other=0.0)
    pair = (strip * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2))[None, :]
    byte = tl.load(codes + row * (columns // 2) + pair, mask=known & (pair < columns // 2), other=0).to(tl.int32)
    high = tl.reshape(tl.load(code4 + (byte >> 4)), (ROWS, SCALES, BLOCK // 2)) * scale[:, :, None]
    low = tl.reshape(tl.load(code4 + (byte & 15)), (ROWS, SCALES, BLOCK // 2)) * scale[:, :, None]
    values = tl.reshape(tl.interleave(high, low), (ROWS, COLUMNS))
    column, k = (strip * COLUMNS + tl.arange(0, COLUMNS))[None, :], tl.arange(0, PADDED)
    left = tl.load(b + row * RANK + k[None, :], mask=known & (k < RANK)[None, :], other=0.0)
    right = tl.load(a + k[:, None] * columns + column, mask=(k < RANK)[:, None] & (column < columns), other=0.0)
    values += tl.dot(left, right) * factor
    tl.store(out + row * columns + column, values.to(out.dtype.element_ty), mask=known & (column < columns))


def dequantize_cuda(
    codes: Tensor,
    absmax: Tensor,
    absmax2: Tensor,
    mean: Tensor,
    tables: Tables,
    double: bool,
    out: Tensor,
    share: LowRank | None = None,
) -> Tensor:
    """Write the weight, `share` added, into the contiguous `out`; the byte ranges as in quant.Stored, all uint8.

    With a share `out` has as many columns as fill whole blocks.
    """
    assert out.is_contiguous()
    if double:
        absmax2, mean = absmax2.view(torch.float32), mean.view(torch.float32)
    else:
        absmax = absmax.view(torch.float32)
        absmax2 = mean = absmax  # not read
    where = (codes, absmax, absmax2, mean, tables.code4, tables.code8)
    if share is None:
        _dequantize[(triton.cdiv(codes.numel(), _BYTES),)](
            *where, out, codes.numel(), out.numel(),
            DOUBLE=double, BYTES=_BYTES, BLOCK=BLOCK, BLOCK2=BLOCK2, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        return out
    (rows, columns), rank = out.shape, share.a.shape[0]
    assert columns % BLOCK == 0 and share.a.is_contiguous() and share.b.is_contiguous()
    _dequantize_adapted[(triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))](
        *where, share.a, share.b, out, rows, columns, share.scale,
        DOUBLE=double, RANK=rank, PADDED=_padded(rank), ROWS=_ROWS, COLUMNS=_COLUMNS, BLOCK=BLOCK, BLOCK2=BLOCK2,
        num_warps=2,
    )  # fmt: skip
    return out


def _padded(rank: int) -> int:
    """The rank rounded up to a side of a product on tensor cores: a power of two, at least 16."""
    return 1 << max(4, (rank - 1).bit_length())


@triton.jit  # type: ignore[untyped-decorator]
def _adapter_gradients(  # type: ignore[no-untyped-def]
    dy, dy_stride, b, xa, xa_stride, dxa_parts, db_parts, jobs, tokens, rows,
    RANK: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: a job's columns of dy for TOKENS tokens; its share of dy B and, per COLUMNS, of dy^T xa."""
    job, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first = tl.multiple_of(tl.load(jobs + job * 4), 16)
    end = tl.multiple_of(tl.load(jobs + job * 4 + 1), 16)
    shift = tl.multiple_of(tl.load(jobs + job * 4 + 2), 16)
    token, k = (chunk * TOKENS + tl.arange(0, TOKENS))[:, None], tl.arange(0, PADDED)[None, :]
    inside = (token < tokens) & (k < RANK)
    left = tl.load(xa + token * xa_stride + tl.load(jobs + job * 4 + 3) + k, mask=inside, other=0.0)
    total = tl.zeros((TOKENS, PADDED), tl.float32)
    for start in tl.range(first, end, COLUMNS, num_stages=STAGES):
        column = start + tl.arange(0, COLUMNS)
        tile = tl.load(
            dy + token * dy_stride + column[None, :], mask=(token < tokens) & (column < end)[None, :], other=0.0
        )
        at, known = (column - shift)[:, None] * RANK + k, (column < end)[:, None] & (k < RANK)
        total = tl.dot(tile, tl.load(b + at, mask=known, other=0.0), total)
        tl.store(db_parts + chunk * rows * RANK + at, tl.dot(tl.trans(tile), left), mask=known)
    tl.store(dxa_parts + (job * tokens + token) * RANK + k, total, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _add_up(parts, out, count, size, stride, factor, RANK: tl.constexpr, ELEMENTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """out (size / RANK rows of RANK, `stride` apart) = factor * the sum of `count` parts of `size` elements."""
    at = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = at < size
    total, part = tl.zeros((ELEMENTS,), tl.float32), parts + at
    for _ in range(count):
        total += tl.load(part, mask=inside, other=0.0)
        part += size
    to = out + (at // RANK).to(tl.int64) * stride + at % RANK
    tl.store(to, (total * factor).to(out.dtype.element_ty), mask=inside)


def adapter_gradients(
    dy: Tensor, b: Tensor, xa: Tensor, members: Sequence[Member], scale: float, dxa: Tensor, db: Tensor
) -> None:
    """dxa = scale * dy B and dB = dy^T xa of the members that share an output, in one pass over dy.

    dy (tokens, width), b (rows, rank), xa and dxa (tokens, adapters * rank), db (rows, rank) float32; neighbours in a
    row lie side by side, b and db are contiguous. A member is (first column of dy, first row of b, number of both,
    first column of xa); all but the last are multiples of 16.
    """
    assert b.is_contiguous() and db.is_contiguous() and dy.stride(1) == xa.stride(1) == dxa.stride(1) == 1
    (tokens, _), (rows, rank) = dy.shape, b.shape
    size = 512 if rank <= 16 else 256  # tokens of a program; more of them don't fit into shared memory
    chunks = triton.cdiv(tokens, size)
    jobs, counts = _jobs(tuple(members), max(1, _PROGRAMS // chunks), dy.device)
    dxa_parts = torch.empty(sum(counts), tokens, rank, dtype=torch.float32, device=dy.device)
    db_parts = torch.empty(chunks, rows, rank, dtype=torch.float32, device=dy.device)
    _adapter_gradients[(sum(counts), chunks)](
        dy, dy.stride(0), b, xa, xa.stride(0), dxa_parts, db_parts, jobs, tokens, rows,
        RANK=rank, PADDED=_padded(rank), TOKENS=size, COLUMNS=_WIDTH, STAGES=3, num_warps=8,
    )  # fmt: skip
    first = 0
    for (_, _, _, at), count in zip(members, counts, strict=True):
        _sum(dxa_parts[first : first + count], dxa[:, at : at + rank], scale)
        first += count
    _sum(db_parts, db, 1.0)


def _sum(parts: Tensor, out: Tensor, factor: float) -> None:
    """out (n, rank) = factor * the sum of parts (count, n, rank) float32."""
    size = out.numel()
    _add_up[(triton.cdiv(size, 1024),)](
        parts, out, len(parts), size, out.stride(0), factor, RANK=out.shape[1], ELEMENTS=1024
    )


@lru_cache(maxsize=256)
def _jobs(members: tuple[Member, ...], limit: int, device: torch.device) -> tuple[Tensor, tuple[int, ...]]:
    """Columns of dy for every program, (jobs, 4) int32, and how many jobs each member has; about `limit` in all."""
    each = triton.cdiv(sum(count for _, _, count, _ in members), limit)
    step = triton.cdiv(each, _WIDTH) * _WIDTH
    rows, counts = list[list[int]](), list[int]()
    for column, row, count, at in members:
        starts = range(column, column + count, step)
        rows += [[start, min(start + step, column + count), column - row, at] for start in starts]
        counts.append(len(starts))
    return torch.tensor(rows, dtype=torch.int32, device=device), tuple(counts)


@triton.jit  # type: ignore[untyped-decorator]
def _dropout(x, seeds, out, number, probability, inverse, numel, ELEMENTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Philox by (step seed, group, member) and position."""
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = at < numel
    seed = tl.load(seeds) + (tl.load(seeds + 1) * 64 + number) * 1000003
    keep = tl.rand(seed, at) >= probability
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, tl.where(keep, values * inverse, 0.0).to(out.dtype.element_ty), mask=inside)


def dropout_cuda(x: Tensor, seeds: Tensor, number: int, probability: float) -> Tensor:
    """Inverted dropout of x; `seeds` (2,) int64 = (step seed, group)."""
    x = x.contiguous()
    out = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), 4096),)
    _dropout[grid](x, seeds, out, number, probability, 1 / (1 - probability), x.numel(), ELEMENTS=4096, num_warps=8)
    return out
