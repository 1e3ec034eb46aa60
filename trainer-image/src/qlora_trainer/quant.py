"""4-bit storage of frozen weights, bit-equal to `bitsandbytes.functional.quantize_4bit` (block size 64).

A weight of n elements becomes up to four ranges of a blob: `codes` (two 4-bit indices a byte, the first in the high
nibble), `absmax` (a scale per 64 elements) and, with double quantization, `absmax2` (float32 per 256 scales)
and `mean` (float32). value = code4[index] * scale, scale = code8[absmax] * absmax2 + mean (arXiv:2305.14314, 3).

Rules: quantization is bitsandbytes' own function, so there is nothing to drift; dequantization multiplies in float32
without fused multiply-add and rounds once, as bitsandbytes does. No module of bitsandbytes is used: its `Linear4bit`
repacks weights in place on some CPUs.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BLOCK = 64
BLOCK2 = 256
ALIGNMENT = 256  # bytes; every range starts at a multiple of it

FP_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Scheme:
    """How linear weights are stored; `dtype` is their type before quantization (and after, for type none)."""

    type: Literal["nf4", "fp4", "none"]
    double: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class Stored:
    """Where one weight of shape (rows, columns) lies in its blob: offset and size in bytes of each range."""

    rows: int
    columns: int
    codes: tuple[int, int]
    absmax: tuple[int, int] = (0, 0)
    absmax2: tuple[int, int] = (0, 0)
    mean: tuple[int, int] = (0, 0)

    @property
    def end(self) -> int:
        """First byte behind the weight."""
        return max(offset + size for offset, size in (self.codes, self.absmax, self.absmax2, self.mean))


def align(offset: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def place(scheme: Scheme, rows: int, columns: int, offset: int) -> Stored:
    """Lay a (rows, columns) weight out from byte `offset` on."""
    numel = rows * columns
    if scheme.type == "none":
        return Stored(rows, columns, (align(offset), numel * scheme.dtype.itemsize))
    blocks = -(-numel // BLOCK)
    sizes = [(numel + 1) // 2, blocks, 4 * -(-blocks // BLOCK2), 4] if scheme.double else [(numel + 1) // 2, 4 * blocks]
    ranges = []
    for size in sizes:
        start = align(offset)
        ranges.append((start, size))
        offset = start + size
    return Stored(rows, columns, *ranges)


def quantize_into(blob: Tensor, stored: Stored, scheme: Scheme, weight: Tensor) -> None:
    """Write `weight` (rows, columns; on the blob's device) into the uint8 `blob` as `scheme` says."""
    weight = weight.to(scheme.dtype)
    if scheme.type == "none":
        _range(blob, stored.codes).copy_(weight.contiguous().view(-1).view(torch.uint8))
        return
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=scheme.double, quant_type=scheme.type
    )
    _range(blob, stored.codes).copy_(codes.view(-1))
    _range(blob, stored.absmax).copy_(state.absmax.view(-1).view(torch.uint8))
    if scheme.double:
        _range(blob, stored.absmax2).copy_(state.state2.absmax.view(torch.uint8))
        _range(blob, stored.mean).copy_(state.offset.reshape(1).view(torch.uint8))


@dataclass(frozen=True)
class Tables:
    """The code books on a device: `code4` (16,) and `code8` (256,), float32."""

    code4: Tensor
    code8: Tensor

    def to(self, device: torch.device) -> "Tables":
        return Tables(self.code4.to(device), self.code8.to(device))


def read_tables(scheme: Scheme) -> Tables:
    """bitsandbytes' code books for `scheme`, on the CPU (zeros for type none)."""
    if scheme.type == "none":
        return Tables(torch.zeros(16), torch.zeros(256))
    from bitsandbytes import functional

    code4 = functional.get_4bit_type(scheme.type, device="cpu")
    return Tables(code4.float().contiguous(), functional.create_dynamic_map().float().contiguous())


@dataclass(frozen=True)
class LowRank:
    """scale * B A, (rows, columns), of a weight's adapter: a (rank, columns), b (rows, rank), contiguous."""

    a: Tensor
    b: Tensor
    scale: float


def dequantize(
    blob: Tensor, stored: Stored, scheme: Scheme, tables: Tables, out: Tensor, share: LowRank | None = None
) -> Tensor:
    """Write the weight into `out` (rows, columns; contiguous, any floating type) and return it.

    `share` is added in float32, before the one rounding.
    """
    if share is not None and not (out.is_cuda and in_whole_blocks(scheme, stored.columns)):
        weight = dequantize(blob, stored, scheme, tables, torch.empty_like(out, dtype=torch.float32))
        return out.copy_(weight.addmm_(share.b.float(), share.a.float(), alpha=share.scale))
    if scheme.type == "none":
        return out.copy_(_range(blob, stored.codes).view(scheme.dtype).view(stored.rows, stored.columns))
    codes = _range(blob, stored.codes)
    if blob.is_cuda:
        from qlora_trainer.kernels import dequantize_cuda

        absmax2, mean = _range(blob, stored.absmax2), _range(blob, stored.mean)
        return dequantize_cuda(codes, _range(blob, stored.absmax), absmax2, mean, tables, scheme.double, out, share)
    from bitsandbytes import functional as _  # noqa: F401 - registers the operator

    shape = (stored.rows, stored.columns)
    weight = torch.ops.bitsandbytes.dequantize_4bit.default(
        codes, scales(blob, stored, scheme, tables), BLOCK, scheme.type, shape, out.dtype
    )
    return out.copy_(weight)


def in_whole_blocks(scheme: Scheme, columns: int) -> bool:
    """Whether a row consists of whole blocks of 4-bit values, as the kernel that adds a low-rank share needs it."""
    return scheme.type != "none" and columns % BLOCK == 0


def scales(blob: Tensor, stored: Stored, scheme: Scheme, tables: Tables) -> Tensor:
    """float32 scale of every block of 64 elements, (blocks,)."""
    absmax = _range(blob, stored.absmax)
    if not scheme.double:
        return absmax.view(torch.float32)
    coarse = _range(blob, stored.absmax2).view(torch.float32).repeat_interleave(BLOCK2)[: absmax.numel()]
    return tables.code8[absmax.int()] * coarse + _range(blob, stored.mean).view(torch.float32)


def fingerprint(tensor: Tensor) -> tuple[int, int]:
    """Checksum of a contiguous tensor's bytes, computed on its device without a copy of it.

    Two sums modulo 2^64 over its 64-bit words, plain and weighted by odd position numbers: any change within one word
    and any exchange of two different words is seen, others with probability 1 - 2^-64 or so.
    """
    blob = tensor.reshape(-1).view(torch.uint8)
    missing = -blob.numel() % 8
    if missing or blob.storage_offset() % 8:  # of what is small, or of an odd size
        blob = torch.cat([blob, blob.new_zeros(missing)])
    words = blob.view(torch.int64)
    plain = words.sum()
    weighted = torch.zeros_like(plain)
    step = 1 << 22
    for start in range(0, words.numel(), step):
        part = words[start : start + step]
        weighted += (part * torch.arange(2 * start + 1, 2 * (start + part.numel()), 2, device=blob.device)).sum()
    return int(plain), int(weighted)


def _range(blob: Tensor, where: tuple[int, int]) -> Tensor:
    return blob[where[0] : where[0] + where[1]]
