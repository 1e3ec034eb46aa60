"""One GPU: bits against bitsandbytes, the oracle (peft over bitsandbytes), packed samples, recomputation."""

import pytest
import torch
from bitsandbytes import functional
from gpu_shapes import train_config, write_checkpoint
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_trainer.loader import ensure_packed
from qlora_trainer.model import build_model
from qlora_trainer.quant import Scheme, align, dequantize, place, quantize_into, read_tables
from qlora_trainer.sources import Source


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, "tiny", 2)
    return folder


def build(folder, tmp_path, gpu, compile_layers="0", **sections):
    import os

    os.environ["QLORA_COMPILE"] = compile_layers
    config = train_config(**sections)
    base = Source(path=folder, files=[], digest=folder.name)
    model = build_model(config, ensure_packed(config, base, tmp_path, gpu), None, gpu, 1)
    model.verify()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.trainable.items():
        if "lora_B" in name:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(rows=2, length=128):
    return torch.randint(4, 1024, (rows, length), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(4096, 4096), (300, 130), (5, 36)])
def test_bits_equal_bitsandbytes(kind, double, dtype, shape, gpu):
    scheme = Scheme(kind, double, dtype)
    weight = (torch.randn(shape, device=gpu) * 0.02).to(dtype)
    stored = place(scheme, *shape, 0)
    blob = torch.zeros(align(stored.end), dtype=torch.uint8, device=gpu)
    quantize_into(blob, stored, scheme, weight)
    out = dequantize(blob, stored, scheme, read_tables(scheme).to(gpu), torch.empty_like(weight))
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type=kind)
    assert torch.equal(blob[: codes.numel()], codes.view(-1))
    assert torch.equal(out, functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("compiled", ["0", "1"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_oracle_agrees(compiled, recompute, folder, tmp_path, gpu):
    """Loss and gradients in bf16 lie as near to float32's as peft's over bitsandbytes in bf16 do, and near to them."""
    from peft import LoraConfig, get_peft_model

    model = build(folder, tmp_path, gpu, compiled, training={"gradient_checkpointing": recompute})
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": 0}
    )
    oracle = get_peft_model(
        base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    ).train()
    theirs = {n.replace(".default", ""): p for n, p in oracle.named_parameters() if p.requires_grad}
    assert set(theirs) == set(model.trainable)
    for name, parameter in theirs.items():
        parameter.data.copy_(model.trainable[name].data)
    ids = batch()
    with torch.autocast("cuda", torch.bfloat16):
        expected = oracle(input_ids=ids.to(gpu), labels=ids.to(gpu), use_cache=False).loss
    expected.backward()
    loss = model.loss(ids, ids, None, ids.numel() - len(ids))
    loss.backward()
    torch.testing.assert_close(loss, expected.float(), rtol=2e-3, atol=2e-3)
    ours = torch.cat([model.trainable[name].grad.view(-1) for name in theirs])
    reference = torch.cat([parameter.grad.float().view(-1) for parameter in theirs.values()])
    assert (ours - reference).norm() < 0.02 * reference.norm()


@pytest.mark.parametrize("compiled", ["0", "1"])
def test_packed_samples_neither_see_nor_predict_each_other(compiled, folder, tmp_path, gpu):
    model = build(folder, tmp_path, gpu, compiled)
    ids = batch(1, 128)
    positions = torch.cat([torch.arange(50), torch.arange(78)])[None]
    together = model.loss(ids, ids, positions, 1)
    together.backward()
    grad = model.flat_grad.clone()
    model.flat_grad.zero_()
    apart = 0.0
    for part in (ids[:, :50], ids[:, 50:]):
        loss = model.loss(part, part, None, 1)
        loss.backward()  # before the next loss, which refreshes the working copies
        apart += loss.item()
    assert together.item() == pytest.approx(apart, rel=2e-3)
    assert (grad - model.flat_grad).norm() < 0.02 * grad.norm()


def test_dropout_is_repeated_by_recomputation(folder, tmp_path, gpu):
    grads = []
    for recompute in ("none", "full"):
        model = build(folder, tmp_path, gpu, lora={"dropout": 0.3}, training={"gradient_checkpointing": recompute})
        model.set_step_seed(1, 2, 3)
        model.loss(batch(), batch(), None, 254).backward()
        grads.append(model.flat_grad.clone())
    assert (grads[0] - grads[1]).norm() < 0.01 * grads[0].norm()
