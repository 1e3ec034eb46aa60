"""Real agents, each with its own PID 1 and fork server, around the real reconciler: kill, lose, return, stop.

The worker counts steps together with its peers (tests/chaos/toy.py) and keeps every rule of the real one; the real one
goes through the kill grid (tests/chaos/grid.py).
"""

import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.chaos import tiny
from tests.chaos.local import LocalCluster

from qlora_api.names import ConditionType
from qlora_operator.settings import Settings

SECONDS = 120.0
LINE = re.compile(r"^([\d.]+) rank (\d+)/(\d+) generation (\d+) step (\d+)$", re.MULTILINE)


class Step(NamedTuple):
    """A line that a worker printed after a step."""

    time: float
    rank: int
    world_size: int
    generation: int
    step: int


def steps(cluster: LocalCluster) -> list[Step]:
    """All steps of all pods in order of time."""
    found = [
        Step(float(m[1]), *(int(m[i]) for i in range(2, 6)))
        for log in cluster.folder.glob("chaos-*/log")
        for m in LINE.finditer(log.read_text(errors="replace"))
    ]
    return sorted(found)


def recovers(cluster: LocalCluster, generation: int, world_size: int) -> None:
    """A newer generation of this size steps on, and lost at most one step."""

    def newer() -> list[Step]:
        return [s for s in steps(cluster) if s.generation > generation and s.world_size == world_size]

    cluster.wait_for(lambda: len(newer()) > world_size, SECONDS, f"recovery in a world of {world_size}")
    before = max(s.step for s in steps(cluster) if s.generation <= generation)
    resumed = min(s.step for s in steps(cluster) if s.generation > generation)
    assert before - (resumed - 1) <= 1


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory as RUN_DIR is, and short: the path of a Unix socket has at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="elastic-", dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def cluster(folder: Path) -> Iterator[LocalCluster]:
    config = tiny.make_config(folder, "12345678", 100_000, 2)
    environment = {
        "QLORA_WORKER": "tests.chaos.toy:main",
        "QLORA_WARM_UP": "tests.chaos.toy:warm",
        "QLORA_FLUSH": "tests.chaos.toy:flush",
        "TOY_STEPS": "100000",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    settings = Settings(
        trainer_image="none",
        coordinator_url="http://none",
        lease_seconds=2.0,
        drop_seconds=0.5,
        silent_seconds=8.0,
        start_wait_seconds=60.0,
    )
    with LocalCluster(config, folder, environment, settings) as made:
        made.wait_for(lambda: any(s.world_size == 2 and s.step > 5 for s in steps(made)), SECONDS, "two members")
        yield made


def test_kill_lose_return_and_stop(cluster: LocalCluster) -> None:
    """One history, because every start of a pod imports torch."""
    generation = cluster.status.generation
    pid = cluster.members()[0].worker_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    recovers(cluster, generation, 2)

    generation = cluster.status.generation
    cluster.capacity = 1
    lost = cluster.members()[0]
    lost.kill()
    recovers(cluster, generation, 1)
    survivor = f'qlora_trainer_restart_seconds{{namespace="default",pod="{cluster.members()[0].name}"'
    cluster.wait_for(lambda: survivor in cluster.metrics(), SECONDS, "the restart's duration")

    cluster.stop_operator()
    known = max(s.step for s in steps(cluster))
    cluster.wait_for(lambda: max(s.step for s in steps(cluster)) > known + 10, SECONDS, "training without an operator")
    cluster.start_operator()

    generation, pid = cluster.status.generation, cluster.members()[0].worker_pid()
    cluster.capacity = 2
    cluster.wake()
    recovers(cluster, generation, 2)
    assert cluster.members()[0].worker_pid() == pid, "a worker that was not lost goes on in its process"
    assert cluster.members()[0].uid != lost.uid, "a newcomer is never first"

    generation = cluster.status.generation
    os.kill(cluster.members()[0].agent_pid(), signal.SIGKILL)
    recovers(cluster, generation, 2)
    assert "starting it again" in "".join(pod.log for pod in cluster.pods.values())

    cluster.patch(suspend=True)
    cluster.wait_for(lambda: not cluster.pods, SECONDS, "all pods gone")
    suspended = [c for c in cluster.status.conditions if c.type == ConditionType.SUSPENDED]
    assert suspended and suspended[0].status == "True"


def test_no_process_outlives_its_pod(cluster: LocalCluster) -> None:
    """The chain PID 1, fork server, agent, worker: the death of the first is the death of all."""
    pod = cluster.members()[0]
    agent, worker = pod.agent_pid(), pod.worker_pid()
    cluster.capacity = 1
    os.kill(pod.process.pid, signal.SIGKILL)
    for pid in (agent, worker):
        cluster.wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists(), SECONDS, f"the end of process {pid}")
