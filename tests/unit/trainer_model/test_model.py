"""Loss and gradients against peft over bitsandbytes, every family against transformers, every switch, the cache."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.sources import source_of
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from qlora_trainer.attention import NAME, pick_attention
from qlora_trainer.errors import BadConfig, BadModel, CorruptBase
from qlora_trainer.groups import weight_of
from qlora_trainer.loader import ensure_packed
from qlora_trainer.model import build_model
from qlora_trainer.skeleton import build_skeleton, group_linears, is_target
from qlora_trainer.weights import read_header

CPU = torch.device("cpu")
FAMILIES = ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3"]


def build(config, model_dir, cache):
    return build_model(config, ensure_packed(config, source_of(model_dir), cache, CPU), None, CPU, 1)


def batch(length=24, rows=2):
    return torch.randint(1, 300, (rows, length), generator=torch.Generator().manual_seed(7))


def plain_model(model, model_dir):
    """transformers' model with the base's dequantized weights and the adapter added, in float32."""
    plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for group in model.adapter.groups:
        weights = weight_of(model.layers[group.plan.layer].packed.data_bytes, group.key, torch.float32)
        for name, weight in zip(group.plan.names, weights.split(group.rows), strict=True):
            path = f"{group.plan.path}.{name}"
            a = model.trainable.get(f"base_model.model.{path}.lora_A.weight")
            if a is not None:
                b = model.trainable[f"base_model.model.{path}.lora_B.weight"]
                weight = weight + group.plan.spec.scale * (b @ a).detach()
            plain.get_submodule(path).weight.data.copy_(weight)
    return plain.train()


def fill_b(model):
    """B other than zero, so that every gradient is."""
    generator = torch.Generator().manual_seed(11)
    for name, parameter in model.trainable.items():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_transformers_does(family, checkpoint, config_of, cache):
    model = build(config_of(training={"gradient_checkpointing": "full"}), checkpoint(family), cache)
    fill_b(model)
    ids = batch()
    plain = plain_model(model, checkpoint(family))
    expected = plain(ids, labels=ids, use_cache=False).loss
    loss = model.loss(ids, ids, None, ids.numel() - len(ids))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    for group in model.adapter.groups:
        for name in group.plan.names:
            path = f"{group.plan.path}.{name}"
            weight_grad = plain.get_submodule(path).weight.grad
            a, b = (model.trainable[f"base_model.model.{path}.lora_{k}.weight"] for k in "AB")
            scale = group.plan.spec.scale
            torch.testing.assert_close(b.grad, scale * weight_grad @ a.T, rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(a.grad, scale * b.T @ weight_grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_peft_over_bitsandbytes_agrees(dora, checkpoint, config_of, cache):
    from peft import LoraConfig, get_peft_model

    config = config_of(lora={"use_dora": dora, "use_rslora": not dora, "r": 4, "alpha": 8})
    model = build(config, checkpoint(), cache)
    fill_b(model)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(checkpoint(), quantization_config=quantization, dtype=torch.float32)
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", use_dora=dora, use_rslora=not dora, task_type="CAUSAL_LM"
    )
    oracle = get_peft_model(base, lora).train()
    theirs = {
        name.replace(".default", "").replace("vector.weight", "vector"): parameter
        for name, parameter in oracle.named_parameters()
        if parameter.requires_grad
    }
    assert set(theirs) == set(model.trainable)
    for name, parameter in theirs.items():
        if name.endswith("lora_magnitude_vector"):
            torch.testing.assert_close(parameter.data, model.trainable[name].data)
        parameter.data.copy_(model.trainable[name].data)
    ids = batch()
    expected = oracle(input_ids=ids, labels=ids, use_cache=False).loss
    loss = model.loss(ids, ids, None, ids.numel() - len(ids))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    for name, parameter in theirs.items():
        torch.testing.assert_close(model.trainable[name].grad, parameter.grad, rtol=2e-3, atol=1e-6)


def test_packed_samples_neither_see_nor_predict_each_other(checkpoint, config_of, cache):
    model = build(config_of(), checkpoint(), cache)
    fill_b(model)
    ids = batch(30, 1)
    positions = torch.cat([torch.arange(11), torch.arange(19)])[None]
    together = model.loss(ids, ids, positions, 1)
    apart = model.loss(ids[:, :11], ids[:, :11], None, 1) + model.loss(ids[:, 11:], ids[:, 11:], None, 1)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


def test_dropout_follows_the_seed_and_recomputation_repeats_it(checkpoint, config_of, cache):
    grads = []
    for recompute, seed in (("none", 1), ("full", 1), ("none", 2)):
        model = build(
            config_of(lora={"dropout": 0.3}, training={"gradient_checkpointing": recompute}), checkpoint(), cache
        )
        fill_b(model)
        model.set_step_seed(seed, 4, 0)
        model.loss(batch(), batch(), None, 46).backward()
        grads.append(model.flat_grad.clone())
    torch.testing.assert_close(grads[0], grads[1])
    assert (grads[0] - grads[2]).norm() > 0.01 * grads[0].norm()


def test_recomputation_gives_the_same_gradients_and_gradients_add_up(checkpoint, config_of, cache):
    grads = []
    for recompute in ("none", "full"):
        model = build(config_of(training={"gradient_checkpointing": recompute}), checkpoint(), cache)
        fill_b(model)
        for _ in range(2):
            model.loss(batch(), batch(), None, 46).backward()
        grads.append(model.flat_grad.clone())
    assert torch.equal(grads[0], grads[1])
    for parameter in model.trainable.values():  # what optimizers do by default is repaired
        parameter.grad = None
    model.loss(batch(), batch(), None, 46).backward()
    torch.testing.assert_close(model.flat_grad * 2, grads[0])


def test_frozen_a_trains_b_alone(checkpoint, config_of, cache):
    model = build(config_of(lora={"freeze_a": True, "target_modules": ["q_proj", "v_proj"]}), checkpoint(), cache)
    assert {name.split(".")[-3] for name in model.trainable} == {"q_proj", "v_proj"}
    assert all("lora_B" in name for name in model.trainable)
    assert all("lora_A" in name for name in model.frozen)
    assert len(model.frozen) == len(model.trainable) == 4
    model.loss(batch(), batch(), None, 46).backward()
    assert model.flat_grad.norm() > 0
    assert model.flat_grad.numel() == sum(p.numel() for p in model.trainable.values())


def test_neftune_noise_follows_the_seed(checkpoint, config_of, cache):
    model = build(config_of(training={"neftune_noise_alpha": 5.0}), checkpoint(), cache)
    losses = []
    for seed in (1, 2, 1):
        model.set_step_seed(seed, 0, 0)
        losses.append(model.loss(batch(), batch(), None, 46).item())
    assert losses[0] == losses[2] != losses[1]


def test_evaluation_leaves_the_base_alone(checkpoint, config_of, cache):
    model = build(config_of("bfloat16"), checkpoint(), cache)
    model.eval()
    with torch.no_grad():
        first = model.loss(batch(), batch(), None, 1)
        assert first == model.loss(batch(), batch(), None, 1)
    model.verify()


def test_a_lone_rank_offloads_its_base(checkpoint, config_of, cache):
    whole = build(config_of(), checkpoint(), cache)
    try:
        offloaded = build(config_of(training={"cpu_offload": True}), checkpoint(), cache)
        assert offloaded.plan.cpu_offload and not whole.plan.cpu_offload
        offloaded.verify()
        grads = []
        for model in (whole, offloaded):
            fill_b(model)
            model.loss(batch(), batch(), None, 46).backward()
            grads.append(model.flat_grad)
        assert torch.equal(*grads)
    finally:
        torch.distributed.destroy_process_group()


def test_damage_on_disk_is_refused_and_built_anew(checkpoint, config_of, cache):
    config = config_of()
    packed = ensure_packed(config, source_of(checkpoint()), cache, CPU)
    file = packed.folder / packed.layers[1].file
    content = bytearray(file.read_bytes())
    content[100] ^= 4
    file.write_bytes(content)
    with pytest.raises(CorruptBase, match="layer 1"):
        build(config, checkpoint(), cache).verify()
    build(config, checkpoint(), cache).verify()
    file.write_bytes(content[:50])  # torn by a crash of the node
    build(config, checkpoint(), cache).verify()


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "tables.code4"])
def test_damage_to_what_is_not_quantized_is_refused_and_built_anew(name, checkpoint, config_of, cache):
    config = config_of()
    file = ensure_packed(config, source_of(checkpoint()), cache, CPU).folder / "rest.safetensors"
    content = bytearray(file.read_bytes())
    content[read_header(file)[name].offset + 9] ^= 4
    file.write_bytes(content)
    with pytest.raises(CorruptBase, match=f"{name}: .*removed: the next start builds it anew"):
        build(config, checkpoint(), cache)
    build(config, checkpoint(), cache)


def test_builders_share_one_cache(checkpoint, config_of, cache):
    config, folder = config_of(quantization={"type": "fp4"}), checkpoint()
    with ThreadPoolExecutor(4) as pool:
        packed = list(pool.map(lambda _: ensure_packed(config, source_of(folder), cache, CPU), range(4)))
    assert len({p.digest for p in packed}) == 1
    assert sorted(p.name for p in (cache / "packed").iterdir()) == [packed[0].digest]
    build(config, checkpoint(), cache).verify()


def test_wrong_models_are_refused(checkpoint, config_of, cache, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint(), folder)
    with pytest.raises(BadConfig, match="q_proj"):
        build(config_of(lora={"target_modules": ["nothing"]}), checkpoint(), cache)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadModel, match="safetensors"):
        ensure_packed(config_of(), source_of(folder), cache, CPU)
    with pytest.raises(BadModel, match="no causal LM"):
        build_skeleton(AutoConfig.for_model("vit"), torch.float32)


def test_experts_are_refused(checkpoint, config_of, cache):
    """Not for weights that the files seem to lack."""
    with pytest.raises(BadModel, match=r"layers\.0\.mlp\.experts\.\w+ has shape .* mixture-of-experts models are not"):
        build(config_of(), checkpoint("mixtral"), cache)


@pytest.mark.parametrize(
    ("family", "changes", "longest"),
    [
        ("llama", {}, 1 << 20),
        ("mistral", {"sliding_window": 64}, 64),
        ("llama4_text", {"attention_chunk_size": 128}, 128),
        ("gemma2", {"sliding_window": 1 << 20}, 0),
        ("gpt_oss", {}, 0),
    ],
)
def test_flash_attention_over_packed_samples_only_where_a_layer_sees_all_of_a_sample(family, changes, longest):
    config = AutoConfig.for_model(family, **changes)
    for length in (longest, longest + 1):
        picked = pick_attention(config, length, torch.device("cuda"), torch.bfloat16)
        assert (picked == NAME) == (0 < length <= longest or family == "llama"), length
    assert pick_attention(config, longest, CPU, torch.bfloat16) is None


def test_names():
    names = [
        "attn.q_proj",
        "attn.k_proj",
        "attn.v_proj",
        "attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    assert group_linears(names) == [tuple(names[:3]), (names[3],), tuple(names[4:6]), (names[6],)]
    assert is_target("model.layers.0.mlp.up_proj", ["up_proj"])
    assert not is_target("model.layers.0.mlp.up_proj", ["p_proj"])
