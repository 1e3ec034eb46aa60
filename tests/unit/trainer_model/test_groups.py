"""A group's weights with its adapters' share in them, and what the operator computes with those."""

import pytest
import torch

from qlora_trainer import ops
from qlora_trainer.groups import GroupSpec, output_weights, register, weight_of
from qlora_trainer.quant import Scheme, align, dequantize, place, quantize_into, read_tables

COLUMNS, RANK, SCALE = 128, 4, 2.0


def make(rows, adapted, kind="nf4"):
    """(key, blob, every member's weight, A, B) of a group in float32."""
    generator = torch.Generator().manual_seed(1)
    scheme, members, end = Scheme(kind, kind != "none", torch.float32), [], 0
    for count in rows:
        members.append(place(scheme, count, COLUMNS, end))
        end = align(members[-1].end)
    blob, tables = torch.zeros(end, dtype=torch.uint8), read_tables(scheme)
    base = []
    for member in members:
        quantize_into(blob, member, scheme, torch.randn(member.rows, COLUMNS, generator=generator))
        base.append(dequantize(blob, member, scheme, tables, torch.empty(member.rows, COLUMNS)))
    key = register(GroupSpec(tuple(members), adapted, scheme, RANK, SCALE, 0.0), tables)
    b_rows = sum(count for count, has in zip(rows, adapted, strict=True) if has)
    a = torch.randn(sum(adapted) * RANK, COLUMNS, generator=generator)
    return key, blob, base, a, torch.randn(b_rows, RANK, generator=generator)


@pytest.mark.parametrize("kind", ["nf4", "none"])
@pytest.mark.parametrize("adapted", [(True, True, True), (True, False, True), (False, True, False)])
@pytest.mark.parametrize("rows", [(128, 32, 32), (256, 160, 192)])
def test_every_member_gets_its_own_adapters_share(rows, adapted, kind):
    key, blob, base, a, b = make(rows, adapted, kind)
    wanted, left_a, left_b = [], a, b
    for weight, has in zip(base, adapted, strict=True):
        if has:
            weight = weight + SCALE * left_b[: len(weight)] @ left_a[:RANK]
            left_a, left_b = left_a[RANK:], left_b[len(weight) :]
        wanted.append(weight)
    torch.testing.assert_close(weight_of(blob, key, torch.float32, factors=(a, b)), torch.cat(wanted))
    torch.testing.assert_close(torch.cat([*output_weights(blob, key, torch.float32, (a, b))]), torch.cat(wanted))
    torch.testing.assert_close(weight_of(blob, key, torch.float32), torch.cat(base))


@pytest.mark.parametrize("adapted", [(True, True, True), (False, True, False)])
@pytest.mark.parametrize("rows", [(128, 32, 32), (256, 160, 192)])
def test_added_to_the_weights_or_to_the_outputs_is_the_same(rows, adapted, monkeypatch):
    key, blob, _, a, b = make(rows, adapted)
    x = torch.randn(10, COLUMNS, generator=torch.Generator().manual_seed(2))
    found = []
    for added in (True, False):
        monkeypatch.setattr(ops, "_adds_to_weights", lambda *_, added=added: added)
        leaf, a_master, b_master = (t.clone().requires_grad_() for t in (x, a, b))
        *outputs, _ = ops.linear(leaf, blob, a, b, a_master, b_master, torch.zeros(2, dtype=torch.int64), key, True)
        y = torch.cat(outputs, -1)
        y.backward(torch.cos(torch.arange(y.numel())).view(y.shape))
        found.append((y, leaf.grad, a_master.grad, b_master.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
