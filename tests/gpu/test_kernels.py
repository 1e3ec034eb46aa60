"""One GPU: an adapter's share added to the dequantized weights, and its gradients in one pass over dy."""

import pytest
import torch

from qlora_trainer import ops
from qlora_trainer.groups import GroupSpec, register
from qlora_trainer.kernels import adapter_gradients
from qlora_trainer.quant import LowRank, Scheme, align, dequantize, place, quantize_into, read_tables


def normal(*shape, gpu, scale=1.0):
    return (torch.randn(shape, device=gpu) * scale).bfloat16()


def error(value, truth):
    return ((value.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("rank", [8, 16, 64])
@pytest.mark.parametrize("shape", [(4096, 4096), (1000, 192), (70, 64), (300, 130)])
def test_a_weight_gets_its_adapters_share_before_the_one_rounding(shape, rank, double, gpu):
    scheme = Scheme("nf4", double, torch.bfloat16)
    stored, tables = place(scheme, *shape, 0), read_tables(scheme).to(gpu)
    blob = torch.zeros(align(stored.end), dtype=torch.uint8, device=gpu)
    quantize_into(blob, stored, scheme, normal(*shape, gpu=gpu, scale=0.02))
    share = LowRank(normal(rank, shape[1], gpu=gpu, scale=0.02), normal(shape[0], rank, gpu=gpu, scale=0.02), 2.0)
    base = dequantize(blob, stored, scheme, tables, torch.empty(shape, device=gpu))
    exact = base.double() + 2 * share.b.double() @ share.a.double()
    out = dequantize(blob, stored, scheme, tables, torch.empty(shape, dtype=torch.bfloat16, device=gpu), share)
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-7)
    assert (out != exact.bfloat16()).float().mean() < 1e-3  # a sum near the middle of two bfloat16


@pytest.mark.parametrize("rank", [8, 16, 32])
@pytest.mark.parametrize("tokens", [8192, 700])
@pytest.mark.parametrize("gap", [0, 1024])
@pytest.mark.parametrize("rows", [(14336,), (4096, 1024), (48, 16)])
def test_gradients_in_one_pass_are_those_of_two_products(rows, gap, tokens, rank, gpu):
    """`gap`: columns of dy before each member that belong to one without adapter."""
    dy = normal(tokens, sum(rows) + gap * len(rows), gpu=gpu, scale=1e-3)
    b, xa = normal(sum(rows), rank, gpu=gpu), normal(tokens, len(rows) * rank, gpu=gpu)
    firsts = [sum(rows[:i]) for i in range(len(rows))]
    members = [(firsts[i] + (i + 1) * gap, firsts[i], count, i * rank) for i, count in enumerate(rows)]
    results = []
    for _ in range(2):
        dxa, db = torch.empty_like(xa), torch.empty(b.shape, device=gpu)
        adapter_gradients(dy, b, xa, members, 2.0, dxa, db)
        results.append((dxa, db))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    for column, first, count, at in members:
        mine, part = dy[:, column : column + count].double(), slice(first, first + count)
        assert error(dxa[:, at : at + rank], 2 * mine @ b[part].double()) < 2**-8
        assert error(db[part], mine.t() @ xa[:, at : at + rank].double()) < 1e-5


@pytest.mark.parametrize("rows", [(4096, 1024, 1024), (4096,), (14336, 14336)])
def test_the_group_is_as_near_to_the_truth_either_way(rows, gpu, monkeypatch):
    """The truth: float64 over the float32 values of the 4-bit weights; y, dx, dA and dB by both ways of computing."""
    scheme, columns, rank, tokens = Scheme("nf4", True, torch.bfloat16), 4096, 16, 4096
    members, end = [], 0
    for count in rows:
        members.append(place(scheme, count, columns, end))
        end = align(members[-1].end)
    spec = GroupSpec(tuple(members), (True,) * len(rows), scheme, rank, 2.0, 0.0)
    tables, blob = read_tables(scheme), torch.zeros(end, dtype=torch.uint8, device=gpu)
    base = torch.empty(sum(rows), columns, device=gpu)
    for member, part in zip(members, base.split(rows), strict=True):
        quantize_into(blob, member, scheme, normal(member.rows, columns, gpu=gpu, scale=0.02))
        dequantize(blob, member, scheme, tables.to(gpu), part)
    x = normal(tokens, columns, gpu=gpu)
    a = normal(rank * len(rows), columns, gpu=gpu, scale=0.01)
    b, dy = normal(sum(rows), rank, gpu=gpu, scale=0.01), normal(tokens, sum(rows), gpu=gpu, scale=1e-3)
    truth = _truth(x, base, a, b, dy, rows, rank)
    measured = {}
    for added in (True, False):
        if not added:
            monkeypatch.setattr(ops, "_on_hopper", lambda _: False)
        leaf = x.clone().requires_grad_()
        factors = [a, b, a.float().requires_grad_(), b.float().requires_grad_()]
        seeds = torch.zeros(2, dtype=torch.int64, device=gpu)
        *outputs, _ = ops.linear(leaf, blob, *factors, seeds, register(spec, tables), True)
        y = torch.cat(outputs, 1)
        y.backward(dy)
        found = (y, leaf.grad, factors[2].grad, factors[3].grad)
        measured[added] = [error(value, exact) for value, exact in zip(found, truth, strict=True)]
    print(rows, measured)
    for mine, theirs in zip(measured[True], measured[False], strict=True):
        assert mine < 1.05 * theirs + 1e-6


def _truth(x, base, a, b, dy, rows, rank):
    """(y, dx, dA, dB) in float64."""
    x, base, a, b, dy = (t.double() for t in (x, base, a, b, dy))
    weight, pieces_a = base.clone(), a.split(rank)
    for part, mine, ours in zip(weight.split(rows), b.split(rows), pieces_a, strict=True):
        part += 2 * mine @ ours
    gradients = [
        (2 * (d @ m).t() @ x, 2 * d.t() @ (x @ ours.t()))
        for d, m, ours in zip(dy.split(rows, 1), b.split(rows), pieces_a, strict=True)
    ]
    return x @ weight.t(), dy @ weight, torch.cat([g[0] for g in gradients]), torch.cat([g[1] for g in gradients])
