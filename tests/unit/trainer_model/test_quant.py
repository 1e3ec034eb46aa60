"""Packed bytes equal bitsandbytes' bit for bit, and come back as its dequantization does."""

import pytest
import torch
from bitsandbytes import functional
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_trainer.quant import Scheme, align, dequantize, fingerprint, place, quantize_into, read_tables

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 64), (48, 192), (5, 36), (300, 128)])
def test_bytes_and_values_equal_bitsandbytes(kind, double, dtype, shape):
    scheme = Scheme(kind, double, dtype)
    weight = torch.randn(shape).to(dtype)
    stored = place(scheme, *shape, 17)
    blob = torch.full((align(stored.end),), 255, dtype=torch.uint8)
    quantize_into(blob, stored, scheme, weight)
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type=kind)

    def range_of(where):
        return blob[where[0] : where[0] + where[1]]

    assert torch.equal(range_of(stored.codes), codes.view(-1))
    assert torch.equal(range_of(stored.absmax), state.absmax.view(torch.uint8))
    if double:
        assert torch.equal(range_of(stored.absmax2).view(torch.float32), state.state2.absmax)
        assert torch.equal(range_of(stored.mean).view(torch.float32)[0], state.offset)
    out = dequantize(blob, stored, scheme, read_tables(scheme), torch.empty(shape, dtype=dtype))
    assert torch.equal(out, functional.dequantize_4bit(codes, state))


def test_type_none_keeps_the_weight():
    scheme = Scheme("none", False, torch.bfloat16)
    weight = torch.randn(8, 12).bfloat16()
    stored = place(scheme, 8, 12, 0)
    blob = torch.zeros(align(stored.end), dtype=torch.uint8)
    quantize_into(blob, stored, scheme, weight)
    assert torch.equal(dequantize(blob, stored, scheme, read_tables(scheme), torch.empty_like(weight)), weight)


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=512), st.data())
def test_fingerprint_sees_any_changed_byte(content, data):
    position = data.draw(st.integers(0, len(content) - 1))
    flip = data.draw(st.integers(1, 255))
    blob = torch.tensor(list(content), dtype=torch.uint8)
    damaged = blob.clone()
    damaged[position] ^= flip
    assert fingerprint(blob) != fingerprint(damaged)


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_fingerprint_is_of_the_bytes_alone(offset):
    tensor = torch.arange(40, dtype=torch.bfloat16)[offset:]
    copy = tensor.clone()
    assert fingerprint(tensor) == fingerprint(copy.view(torch.uint8)) == fingerprint(copy.view(-1, 1))


def test_fingerprint_sees_exchanged_words():
    blob = torch.arange(64, dtype=torch.uint8)
    assert fingerprint(blob) != fingerprint(blob.roll(8))
