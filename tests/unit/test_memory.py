"""The memory plan: within 5 % of peaks measured on H200, monotonic, and it fits what it says it fits."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_api.memory import plan, shapes_of
from qlora_api.types import QLoRAFinetuneSpec

GIB = 2**30
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA_70B = {
    **LLAMA_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}


def spec(length=2048, r=16, quantization="nf4", **training):
    return QLoRAFinetuneSpec.model_validate(
        {
            "model": {"uri": "file:///model"},
            "dataset": {"uri": "file:///data"},
            "output": {"uri": "s3://bucket/runs"},
            "lora": {"r": r},
            "quantization": {"type": quantization},
            "training": {"maxLength": length, **training},
        }
    )


SMALL_70B = {"gradientCheckpointing": "full", "shardingStrategy": "FULL_SHARD", "length": 1024}

# torch.cuda.max_memory_allocated of benchmarks/gpu_worker.py, 2 x H200, 2026-11-22
MEASURED = [
    (LLAMA_8B, {"gradientCheckpointing": "none"}, 1, 4, 43.894),
    (LLAMA_8B, {"gradientCheckpointing": "full"}, 1, 4, 9.550),
    (LLAMA_8B, {"gradientCheckpointing": "full", "length": 8192}, 1, 1, 9.553),
    (LLAMA_8B, {"gradientCheckpointing": "none", "length": 1024, "r": 64}, 1, 2, 18.415),
    (LLAMA_8B, {"gradientCheckpointing": "none", "quantization": "none"}, 1, 4, 53.541),
    (LLAMA_8B, {"gradientCheckpointing": "none", "shardingStrategy": "FULL_SHARD"}, 2, 4, 42.217),
    (LLAMA_8B, {"gradientCheckpointing": "full", "shardingStrategy": "FULL_SHARD"}, 2, 4, 7.978),
    (LLAMA_8B, {"gradientCheckpointing": "none", "shardingStrategy": "SHARD_GRAD_OP"}, 2, 4, 45.570),
    (LLAMA_70B, {"gradientCheckpointing": "none", "shardingStrategy": "FULL_SHARD"}, 2, 1, 68.288),
    (LLAMA_70B, {**SMALL_70B}, 2, 1, 25.094),
    (LLAMA_70B, {**SMALL_70B, "cpuOffload": True}, 2, 1, 8.651),
]


@pytest.mark.parametrize(("model", "settings", "world_size", "micro_batch", "gib"), MEASURED)
def test_plan_is_within_five_percent_of_the_measured_peak(model, settings, world_size, micro_batch, gib):
    made = plan(spec(**settings), model, 140 * GIB, world_size, micro_batch)
    assert made.gpu_bytes / GIB == pytest.approx(gib, rel=0.05)


def test_one_card_while_it_fits():
    assert plan(spec(), LLAMA_8B, 140 * GIB, 2).sharding == "NO_SHARD"
    assert plan(spec(), LLAMA_70B, 40 * GIB, 4).sharding == "FULL_SHARD"
    assert plan(spec(cpuOffload=True), LLAMA_8B, 140 * GIB, 1).sharding == "FULL_SHARD"


def test_recomputes_only_as_far_as_memory_asks_for():
    roomy, tight = (plan(spec(), LLAMA_8B, gib * GIB, 1, 4) for gib in (140, 24))
    assert roomy.recomputed_layers == 0
    assert 0 < tight.recomputed_layers < 32
    assert tight.fits
    one_less = {**tight.gpu, "activations": tight.gpu["activations"] + tight.gpu["activations"] // 32}
    assert sum(one_less.values()) > 0.95 * tight.gpu_limit


def test_says_what_to_do_when_it_does_not_fit():
    made = plan(spec(), LLAMA_70B, 24 * GIB, 1)
    assert not made.fits
    assert "cpuOffload" in made.advice()
    assert plan(spec(), LLAMA_8B, 140 * GIB, 1).advice() == ""


def test_without_a_gpu_nothing_is_recomputed_unless_asked():
    made = plan(spec(), LLAMA_8B, 0, 2)
    assert (made.recomputed_layers, made.fits, made.gpu) == (0, True, {})
    assert plan(spec(gradientCheckpointing="full"), LLAMA_8B, 0, 2).recomputed_layers == 32


def test_refuses_what_is_no_transformer():
    with pytest.raises(ValueError, match="hidden_size"):
        shapes_of({"num_attention_heads": 2})


@settings(max_examples=80, deadline=None)
@given(
    gib=st.integers(8, 192),
    world_size=st.integers(1, 16),
    length=st.sampled_from([256, 2048, 8192]),
    strategy=st.sampled_from(["auto", "FULL_SHARD", "SHARD_GRAD_OP"]),
)
def test_more_memory_never_recomputes_more(gib, world_size, length, strategy):
    made = [plan(spec(length, shardingStrategy=strategy), LLAMA_8B, n * GIB, world_size, 1) for n in (gib, gib + 8)]
    small, large = made
    if small.sharding == large.sharding:
        assert large.recomputed_layers <= small.recomputed_layers
    assert large.fits or not small.fits
    full = plan(spec(length, shardingStrategy="FULL_SHARD"), LLAMA_8B, gib * GIB, world_size + 1, 1)
    fewer = plan(spec(length, shardingStrategy="FULL_SHARD"), LLAMA_8B, gib * GIB, world_size, 1)
    assert full.recomputed_layers <= fewer.recomputed_layers or world_size == 1
