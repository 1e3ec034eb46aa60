"""The Triton kernels' arithmetic on a CPU, in Triton's interpreter and float32 (it has no bfloat16); see tests/gpu."""

import pytest
import torch
import triton

from qlora_trainer import kernels
from qlora_trainer.quant import LowRank, Scheme, Stored, align, dequantize, place, quantize_into, read_tables

assert triton.knobs.runtime.interpret, "test_kernels.py runs this with TRITON_INTERPRET=1"


def quantized(shape, double):
    scheme = Scheme("nf4", double, torch.float32)
    stored = place(scheme, *shape, 0)
    blob = torch.zeros(align(stored.end), dtype=torch.uint8)
    quantize_into(blob, stored, scheme, torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    return scheme, stored, blob


def run(blob, stored: Stored, scheme, share=None):
    ranges = [blob[start : start + size] for start, size in (stored.codes, stored.absmax, stored.absmax2, stored.mean)]
    out = torch.empty(stored.rows, stored.columns)
    return kernels.dequantize_cuda(*ranges, read_tables(scheme), scheme.double, out, share)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(70, 64), (40, 192), (5, 36)])
def test_dequantized_bits_are_the_cpus(shape, double):
    scheme, stored, blob = quantized(shape, double)
    wanted = dequantize(blob, stored, scheme, read_tables(scheme), torch.empty(shape))
    assert torch.equal(run(blob, stored, scheme), wanted)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("shape", "rank"), [((70, 64), 8), ((40, 192), 16), ((33, 128), 20)])
def test_a_share_is_added(shape, rank, double):
    scheme, stored, blob = quantized(shape, double)
    share = LowRank(torch.randn(rank, shape[1]), torch.randn(shape[0], rank), 2.0)
    wanted = dequantize(blob, stored, scheme, read_tables(scheme), torch.empty(shape), share)
    torch.testing.assert_close(run(blob, stored, scheme, share), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [8, 16, 32])
@pytest.mark.parametrize(
    ("rows", "adapted"),
    [((80,), (True,)), ((96, 32, 64), (True, True, True)), ((96, 32, 64), (True, False, True))],
)
def test_an_adapters_gradients_in_one_pass(rows, adapted, rank):
    """700 tokens: no multiple of a program's; a member without adapter has columns of dy and no rows of B."""
    members, row = [], 0
    for index, (count, has) in enumerate(zip(rows, adapted, strict=True)):
        if has:
            members.append((sum(rows[:index]), row, count, len(members) * rank))
            row += count
    dy, b, xa = torch.randn(700, sum(rows)), torch.randn(row, rank), torch.randn(700, len(members) * rank)
    dxa, db = torch.empty_like(xa), torch.empty_like(b)
    kernels.adapter_gradients(dy, b, xa, members, 2.0, dxa, db)
    for column, first, count, at in members:
        mine, part = dy[:, column : column + count], slice(first, first + count)
        torch.testing.assert_close(dxa[:, at : at + rank], 2 * mine @ b[part], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(db[part], mine.t() @ xa[:, at : at + rank], rtol=1e-4, atol=1e-3)
