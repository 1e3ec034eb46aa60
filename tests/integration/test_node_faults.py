"""Nodes that are at fault or slow, from the worker that finds it to the status that names it: real agents and workers
around the real reconciler, faults scripted."""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.chaos import tiny
from tests.chaos.local import LocalCluster

from qlora_operator.settings import Settings

SECONDS = 120.0


class Stage:
    """A cluster whose workers read scripted faults."""

    def __init__(self, folder: Path, **settings: float) -> None:
        self.folder = folder
        tiny.make_sources(folder)
        config = tiny.make_config(folder, "23456789", 100_000, 2, elasticPolicy={"minNodes": 2, "maxNodes": 2})
        environment = {
            "QLORA_WORKER": "tests.chaos.real:run",
            "QLORA_WARM_UP": "tests.chaos.real:warm",
            "QLORA_FLUSH": "tests.chaos.real:flush",
            "QLORA_DEVICE": "cpu",
            "QLORA_CACHE_DIR": str(folder / "cache"),
            "QLORA_FAULTS": str(folder / "faults"),
            "CHAOS_OUTPUT": f"file://{folder}/bucket",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        timing = {"start_wait_seconds": 60.0, **settings}
        made = Settings(trainer_image="none", coordinator_url="http://none", **timing)  # type: ignore[arg-type]
        self.cluster = LocalCluster(config, folder, environment, made)

    def script(self, *faults: dict[str, object]) -> None:
        (self.folder / "faults").write_text("".join(json.dumps(fault) + "\n" for fault in faults))

    def slow(self) -> dict[str, float]:
        """Stragglers and the seconds that they work for a step; a loaded machine may make one of its own."""
        return {straggler.pod_name: straggler.work_seconds for straggler in self.cluster.status.stragglers}

    def events(self, reason: str) -> list[str]:
        return [text for _, text in self.cluster.history if text.startswith(f"event {reason}:")]

    def wait_for_event(self, reason: str, words: str = "") -> None:
        self.cluster.wait_for(lambda: any(words in event for event in self.events(reason)), SECONDS, f"event {reason}")


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory as RUN_DIR is, and short: the path of a Unix socket has at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="nodes-", dir="/dev/shm") as name:
        yield Path(name)


def test_workers_that_hang_are_restarted_and_counted(folder: Path) -> None:
    """One stands still between forward and backward, the other waits for it in the all-reduce: none tells anything."""
    stage = Stage(folder, hang_floor_seconds=6.0)
    cluster = stage.cluster
    with cluster:
        cluster.wait_for(lambda: cluster.status.progress.step > 5, SECONDS, "training")
        stage.script({"id": "h", "point": "backward", "ranks": [1], "action": "hold"})
        cluster.wait_for(lambda: cluster.status.generation == 2, SECONDS, "a new generation")
        stood = cluster.status.progress.step
        assert cluster.status.restarts.by_reason == {"Hung": 1}
        last = cluster.status.last_failure
        assert last is not None and "nothing was done for" in last.message and "hangFloorSeconds" in last.message
        cluster.wait_for(lambda: cluster.status.progress.step > stood + 5, SECONDS, "training after it")
        assert cluster.status.generation == 2 and len(cluster.status.members) == 2


def test_a_faulty_node_is_avoided_and_a_slow_one_told(folder: Path) -> None:
    """One history, because every start of a pod imports torch."""
    stage = Stage(folder)
    damage = {"point": "preflight-memory", "action": "damage"}
    stage.script({**damage, "id": "a", "pod": "chaos-1-0"}, {**damage, "id": "b", "pod": "chaos-1-1"})
    cluster = stage.cluster
    with cluster:
        cluster.wait_for(lambda: cluster.status.avoided_nodes == ["node-1"], SECONDS, "an avoided node")
        stage.wait_for_event("NodeAvoided")  # the last of this pass: what is told follows the status
        status = cluster.status
        assert status.restarts.by_reason == {"FaultyNode": 2} and status.restarts.failures == 2
        assert status.generation == 0, "it was never let in"
        last = status.last_failure
        assert last is not None and (last.pod_name, last.node_name, last.exit_code) == ("chaos-1-1", "node-1", 82)
        assert "words of memory were not read back as written" in last.message and "Cordon the node" in last.message
        assert len(stage.events("FaultyNode")) == 2 and len(stage.events("NodeAvoided")) == 1

        cluster.wait_for(lambda: cluster.status.progress.step > 12, SECONDS, "training with the third pod")
        assert [member.pod_name for member in cluster.status.members] == ["chaos-0-0", "chaos-1-2"]
        assert cluster.status.generation == 1

        stage.script({"id": "c", "point": "backward", "ranks": [1], "action": "delay:0.2"})
        cluster.wait_for(lambda: stage.slow().get("chaos-1-2", 0) > 0.2, SECONDS, "a straggler")
        assert stage.slow().keys() == {"chaos-1-2"}
        stage.wait_for_event("Straggler", "chaos-1-2 on node node-1 works")
        stage.script()
        cluster.wait_for(lambda: "chaos-1-2" not in stage.slow(), SECONDS, "the straggler's recovery")
        stage.wait_for_event("StragglerRecovered", "chaos-1-2 keeps up again")
        assert cluster.status.generation == 1, "nothing was done about it"
