"""The memory plan: within 5 % of peaks measured on H200, monotonic, and it fits what it says it fits."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.shapes import LLAMA_8B

from qlora_api.footprint import Placement, gpu_items, shapes_of
from qlora_api.memory import pick_micro_batch, plan
from qlora_api.types import QLoRAFinetuneSpec

GIB = 2**30
LLAMA_70B = {
    **LLAMA_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}


def spec(length=2048, r=16, quantization="nf4", nodes=(1, 1), gpus=1, **training):
    return QLoRAFinetuneSpec.model_validate(
        {
            "elasticPolicy": {"minNodes": nodes[0], "maxNodes": nodes[1]},
            "numProcPerNode": gpus,
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


@pytest.mark.parametrize(
    ("model", "gib", "world_size", "settings", "sharding", "offload"),
    [
        (LLAMA_8B, 140, 2, {}, "NO_SHARD", False),
        (LLAMA_8B, 16, 8, {}, "NO_SHARD", False),  # recomputed, but whole
        (LLAMA_70B, 40, 4, {}, "FULL_SHARD", False),
        (LLAMA_70B, 16, 4, {}, "FULL_SHARD", True),
        (LLAMA_70B, 24, 1, {}, "FULL_SHARD", True),  # a lone rank shards over itself
        (LLAMA_8B, 140, 1, {"cpuOffload": True}, "FULL_SHARD", True),
        (LLAMA_8B, 140, 1, {"shardingStrategy": "FULL_SHARD"}, "NO_SHARD", False),
        (LLAMA_8B, 140, 2, {"shardingStrategy": "SHARD_GRAD_OP"}, "SHARD_GRAD_OP", False),
        (LLAMA_70B, 24, 2, {"shardingStrategy": "NO_SHARD", "cpuOffload": True}, "NO_SHARD", False),
        (LLAMA_8B, 0, 4, {}, "NO_SHARD", False),
    ],
)
def test_the_fastest_placement_that_fits(model, gib, world_size, settings, sharding, offload):
    made = plan(spec(**settings), model, gib * GIB, world_size)
    assert (made.sharding, made.cpu_offload) == (sharding, offload)
    assert made.fits or settings.get("shardingStrategy") == "NO_SHARD"
    assert (made.host["base"] > 0) == offload


@settings(max_examples=80, deadline=None)
@given(
    world_size=st.integers(1, 64),
    length=st.sampled_from([256, 2048, 8192]),
    micro_batch=st.integers(1, 8),
    model=st.sampled_from([LLAMA_8B, LLAMA_70B, {**LLAMA_8B, "tie_word_embeddings": True}]),
    quantization=st.sampled_from(["nf4", "none"]),
)
def test_sharding_after_the_backward_pass_never_needs_less_than_a_whole_base(
    world_size, length, micro_batch, model, quantization
):
    """Why `auto` has no SHARD_GRAD_OP."""
    whole, gathered = (
        sum(gpu_items(spec(length, quantization=quantization), shapes_of(model), base, micro_batch, 0).values())
        for base in (
            Placement(world_size, "NO_SHARD", host_table=True),
            Placement(world_size, "SHARD_GRAD_OP", host_table=True),
        )
    )
    assert whole < gathered


@pytest.mark.parametrize(
    ("training", "nodes", "gpus", "gib", "expected"),
    [
        ({"globalBatchSize": 16, "length": 128}, 1, 1, 0, 16),  # fits at once
        ({"globalBatchSize": 16, "length": 2048}, 1, 1, 0, 4),  # as many tokens as fill a chip
        ({"globalBatchSize": 16, "length": 2048}, 4, 2, 0, 2),  # one for each GPU
        ({"globalBatchSize": 4, "length": 128}, 2, 1, 0, 2),
        ({"globalBatchSize": 2, "length": 128}, 8, 8, 0, 1),  # more GPUs than sequences
        ({"globalBatchSize": 15, "length": 128}, 2, 1, 0, 5),  # a divisor
        ({"globalBatchSize": 16, "microBatchSize": 8, "length": 128}, 4, 8, 0, 8),  # the spec's word
        ({"globalBatchSize": 16, "length": 2048}, 1, 1, 140, 4),
        ({"globalBatchSize": 16, "length": 2048}, 1, 1, 10, 2),  # what there is memory for
        ({"globalBatchSize": 16, "length": 2048, "cpuOffload": True}, 1, 1, 10, 4),
        ({"globalBatchSize": 16, "length": 2048}, 1, 1, 2, 1),  # nothing fits
    ],
)
def test_micro_batch(training, nodes, gpus, gib, expected):
    made = spec(nodes=(1, nodes), gpus=gpus, **training)
    assert pick_micro_batch(made, LLAMA_8B, gib * GIB) == expected


@settings(max_examples=80, deadline=None)
@given(
    gib=st.integers(8, 192),
    nodes=st.tuples(st.integers(1, 4), st.integers(0, 6)).map(lambda pair: (pair[0], sum(pair))),
    gpus=st.sampled_from([1, 4, 8]),
    batch=st.integers(1, 128),
    model=st.sampled_from([LLAMA_8B, LLAMA_70B]),
)
def test_one_micro_batch_serves_every_world_of_a_run(gib, nodes, gpus, batch, model):
    """It fits at any number of members when it fits at the fewest, it divides the batch, and all find the same."""
    made = spec(nodes=nodes, gpus=gpus, globalBatchSize=batch)
    micro_batch = pick_micro_batch(made, model, gib * GIB)
    assert batch % micro_batch == 0
    plans = [plan(made, model, gib * GIB, members * gpus) for members in range(nodes[0], nodes[1] + 1)]
    assert {found.micro_batch_size for found in plans} == {micro_batch}
    assert all(found.fits for found in plans) or not plans[0].fits


def test_early_stopping_keeps_the_best_adapter():
    plain, stopping = (plan(spec(**extra), LLAMA_8B, 140 * GIB, 1) for extra in ({}, {"earlyStoppingPatience": 3}))
    numel = plain.gpu["adapter"] // 18  # master, gradient, working copy, two moments: 4 + 4 + 2 + 8 bytes
    assert stopping.gpu["adapter"] - plain.gpu["adapter"] == 4 * numel
    assert stopping.host["snapshots"] - plain.host["snapshots"] == 2 * 4 * numel


def test_recomputes_only_as_far_as_memory_asks_for():
    roomy, tight = (plan(spec(), LLAMA_8B, gib * GIB, 1, 4) for gib in (140, 24))
    assert roomy.recomputed_layers == 0
    assert 0 < tight.recomputed_layers < 32
    assert tight.fits
    one_less = {**tight.gpu, "activations": tight.gpu["activations"] + tight.gpu["activations"] // 32}
    assert sum(one_less.values()) > 0.95 * tight.gpu_limit


def test_says_what_to_do_when_it_does_not_fit():
    made = plan(spec(shardingStrategy="FULL_SHARD"), LLAMA_70B, 24 * GIB, 2)
    assert not made.fits
    assert "cpuOffload" in made.advice()
    offloaded = plan(spec(), LLAMA_70B, 4 * GIB, 2)
    assert not offloaded.fits
    assert "add nodes" in offloaded.advice()
    assert "cpuOffload" not in offloaded.advice()
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
