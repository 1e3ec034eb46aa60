"""Triton kernels: dequantization bit-identical to bitsandbytes, and dropout whose mask is a function of its seeds.

Rules: products and sums of scales are rounded one by one (no fused multiply-add), as in bitsandbytes' two kernels;
sizes need not be multiples of anything.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_trainer.quant import BLOCK, BLOCK2, Tables

_BYTES = 2048  # codes a program dequantizes: 4,096 elements, 64 scales


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


def dequantize_cuda(
    codes: Tensor, absmax: Tensor, absmax2: Tensor, mean: Tensor, tables: Tables, double: bool, out: Tensor
) -> Tensor:
    """Write the weight into the contiguous `out`; the byte ranges as in quant.Stored, all uint8 and aligned."""
    assert out.is_contiguous()
    if double:
        absmax2, mean = absmax2.view(torch.float32), mean.view(torch.float32)
    else:
        absmax = absmax.view(torch.float32)
        absmax2 = mean = absmax  # not read
    _dequantize[(triton.cdiv(codes.numel(), _BYTES),)](
        codes, absmax, absmax2, mean, tables.code4, tables.code8, out, codes.numel(), out.numel(),
        DOUBLE=double, BYTES=_BYTES, BLOCK=BLOCK, BLOCK2=BLOCK2, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


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
