"""Sharded over ranks (gloo) the model computes what it computes on one, and damaged bytes are noticed."""

import multiprocessing

import pytest
import torch
from tests.ports import free_port
from tests.unit.trainer_model.ranks import run_cases
from tests.worlds import PRELOAD

CASES = {
    "fsdp2-full": {"training": {"sharding_strategy": "FULL_SHARD"}},
    "full": {"training": {"sharding_strategy": "FULL_SHARD"}},
    "full-recompute-dropout": {
        "training": {"sharding_strategy": "FULL_SHARD", "gradient_checkpointing": "full"},
        "lora": {"dropout": 0.2},
    },
    "grad-op-dropout": {"training": {"sharding_strategy": "SHARD_GRAD_OP"}, "lora": {"dropout": 0.2}},
    "offload-recompute": {
        "training": {"sharding_strategy": "FULL_SHARD", "cpu_offload": True, "gradient_checkpointing": "full"}
    },
    "unquantized-whole": {"training": {"sharding_strategy": "NO_SHARD"}, "quantization": {"type": "none"}},
    "dora": {"training": {"sharding_strategy": "FULL_SHARD"}, "lora": {"use_dora": True}},
}


@pytest.fixture(scope="module")
def results(checkpoint, config_of, tmp_path_factory):
    """(case, world size) -> what every rank saw; one group of processes a world size runs all its cases."""
    folder = tmp_path_factory.mktemp("ranks")
    for case, sections in CASES.items():
        (folder / case).write_text(config_of(**sections).model_dump_json(by_alias=True))
    found = {}
    for world_size, cases in ((1, list(CASES)), (2, list(CASES)), (3, ["full", "fsdp2-full"])):
        run_ranks(folder, checkpoint(), world_size, cases)
        for case in cases:
            found[case, world_size] = [torch.load(folder / f"{case}-{world_size}-{r}.pt") for r in range(world_size)]
    return found


def run_ranks(folder, model_dir, world_size, cases):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port = free_port()
    started = [
        context.Process(target=run_cases, args=(folder, model_dir, rank, world_size, port, cases), daemon=True)
        for rank in range(world_size)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(500)
        assert process.exitcode == 0, "its words are above"


@pytest.mark.parametrize(("case", "world_size"), [*((case, 2) for case in CASES), ("full", 3), ("fsdp2-full", 3)])
def test_any_number_of_ranks_computes_the_same(case, world_size, results):
    (one,), ranks = results[case, 1], results[case, world_size]
    for rank in ranks:
        torch.testing.assert_close(rank["grad"], one["grad"], rtol=1e-5, atol=1e-6)
        assert rank["evaluated"] == pytest.approx(one["evaluated"], rel=1e-6)
    losses = {key: loss for rank in ranks for key, loss in rank["losses"].items()}
    assert losses == pytest.approx(one["losses"], rel=1e-6)
    assert one["grad"].norm() > 0.01


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_damaged_byte_stops_every_rank(world_size, results):
    for case in ("full", "fsdp2-full"):
        assert all("decoder layer 1" in rank["damaged"] for rank in results[case, world_size])
