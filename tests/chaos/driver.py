"""Carries one cell out against a running cluster: holds the victims at the point, strikes, measures the recovery."""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.cells import Cell
from tests.chaos.local import LocalCluster
from tests.chaos.pods import PodProcess

from qlora_trainer.control import Phase, WorkerState, read_worker_state

SECONDS = 240.0  # for anything: far beyond what is measured, on a busy machine, too
POLL_SECONDS = 0.005
CHECKPOINT_STEPS = 10
FROZEN_SECONDS = 4.0  # longer than a lease


@dataclass(frozen=True)
class Outcome:
    """What a cell cost."""

    cell: Cell
    steps_lost: int
    seconds: float | None  # from the fault to the first new step; None: training never stopped
    generations: int


class Driver:
    """Strikes at one cluster; `plan` is the file of faults that its workers read."""

    def __init__(self, cluster: LocalCluster, plan: Path) -> None:
        self.cluster, self._plan, self._number = cluster, plan, 0

    def run(self, cell: Cell) -> Outcome:
        """Carry the cell out; AssertionError when the run does not recover."""
        self._number += 1
        self.bring_to(cell.size)
        if cell.point == "warm-up":
            return self._strike_newcomer(cell)
        members = self.cluster.members()
        victims = [members[rank] for rank in cell.victims()]
        generation = self.cluster.status.generation
        fault = f"{self._plan.name}-{self._number}"
        if cell.point == "rendezvous":
            self._script(fault, {"point": cell.point}, [victim.name for victim in victims])
            _kill_worker(members[0])
            self._await_claims(fault, len(victims), cell)
        else:
            holders = [0] if cell.point == "manifest" else list(cell.victims())
            self._script(fault, {"point": cell.point, "step": self._moment(cell.point), "ranks": holders})
            self._await_claims(fault, len(holders), cell)
        return self._measure(cell, victims, generation, fault)

    def bring_to(self, size: int) -> None:
        """`size` members that all train, one step on."""
        self.cluster.capacity = size
        self.cluster.wake()

        def arrived() -> bool:
            for pod in sorted(self.cluster.pods.values(), key=lambda pod: pod.started)[size:]:
                self.cluster.delete(pod)
            return self._is_training(size)

        self._wait(arrived, f"a world of {size}")
        start = self.step()
        self._wait(lambda: self.step() > start, "a step")

    def step(self) -> int:
        """The newest step that any worker has completed."""
        return max((state.progress.step for state in self.states()), default=0)

    def states(self) -> list[WorkerState]:
        found = (read_worker_state(pod.run_dir, 0) for pod in list(self.cluster.pods.values()))
        return [state for state in found if state is not None]

    def _measure(self, cell: Cell, victims: list[PodProcess], generation: int, fault: str) -> Outcome:
        before = self.step()
        if cell.world.endswith("changed"):
            self.cluster.capacity = cell.size - len(victims)
        struck = time.monotonic()
        self._strike(cell, victims)
        self._release(fault)
        resumed, seconds = self._await_step(generation, struck, frozen=cell.how == "SIGSTOP", cell=cell, pods=victims)
        return Outcome(cell, max(0, before - resumed), seconds, self.cluster.status.generation - generation)

    def _strike_newcomer(self, cell: Cell) -> Outcome:
        """Hold a newcomer in its warm-up and hit it, or others at that moment."""
        members, generation = self.cluster.members(), self.cluster.status.generation
        known = set(self.cluster.pods)
        fault = f"{self._plan.name}-{self._number}"
        self._script(fault, {"point": cell.point})
        self.cluster.capacity = cell.size + 1
        self.cluster.wake()
        self._await_claims(fault, 1, cell)
        newcomers = [pod for name, pod in self.cluster.pods.items() if name not in known]
        chosen = {"rank 0": members[:1], "other": newcomers, "two": members[:1] + newcomers}
        victims = chosen.get(cell.who, members + newcomers)
        self.cluster.capacity = cell.size
        if set(victims) - set(newcomers):
            return self._measure(cell, victims, generation, fault)
        before = self.step()
        self._strike(cell, victims)
        self._wait(lambda: self.step() > before + 2, "steps without the newcomer")
        self._release(fault)
        for pod in victims:
            pod.thaw()
        return Outcome(cell, 0, None, self.cluster.status.generation - generation)

    def _strike(self, cell: Cell, victims: list[PodProcess]) -> None:
        for pod in victims:
            if cell.how == "SIGTERM":
                self.cluster.delete(pod)  # as the kubelet sends it: to a pod that is being deleted
            elif cell.how == "SIGSTOP":
                pod.freeze()
            elif cell.how == "node":
                pod.kill()
            elif cell.point in ("rendezvous", "warm-up") and not _kill_worker(pod):
                os.kill(pod.agent_pid(), signal.SIGKILL)
            else:
                _kill_worker(pod)

    def _await_step(
        self, generation: int, struck: float, frozen: bool, cell: Cell, pods: list[PodProcess]
    ) -> tuple[int, float]:
        """(step at which a newer generation began, seconds until it did the next)."""
        began: dict[int, int] = {}
        thaw_at = struck + FROZEN_SECONDS if frozen and cell.who == "all" else None
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            for state in self.states():
                newer = state.generation > generation or (thaw_at is not None and time.monotonic() > thaw_at)
                if not newer or state.phase not in (Phase.TRAINING, Phase.PARKED, Phase.FINISHED):
                    continue
                first = began.setdefault(state.generation, state.progress.step)
                if state.progress.step > first:
                    seconds = time.monotonic() - struck
                    for pod in pods:
                        pod.thaw()
                    return first, seconds
            if thaw_at is not None and time.monotonic() > thaw_at:
                for pod in pods:
                    pod.thaw()
            time.sleep(POLL_SECONDS)
        raise AssertionError(f"{cell}: no new step within {SECONDS} s\n{self.cluster.describe()}")

    def _moment(self, point: str) -> int:
        """The next step at which the point is reached, a little ahead."""
        ahead = self.step() + 3
        return -(-ahead // CHECKPOINT_STEPS) * CHECKPOINT_STEPS if point in ("upload", "manifest") else ahead

    def _script(self, fault: str, where: dict[str, object], pods: list[str] | None = None) -> None:
        with self._plan.open("a") as plan:
            for pod in pods or [None]:
                line = {"id": fault, "action": "hold", **where, **({"pod": pod} if pod else {})}
                plan.write(json.dumps(line) + "\n")

    def _await_claims(self, fault: str, number: int, cell: Cell) -> None:
        pattern = f"{self._plan.name}.{fault}.*"
        self._wait(lambda: len(list(self._plan.parent.glob(pattern))) >= number, f"{cell} to reach its point")

    def _release(self, fault: str) -> None:
        self._plan.with_name(f"{self._plan.name}.{fault}.release").touch()

    def _is_training(self, size: int) -> bool:
        generation = self.cluster.status.generation
        members = self.cluster.members()
        found = [read_worker_state(pod.run_dir, 0) for pod in members]
        return len(members) == size == len(self.cluster.status.members) and all(
            state is not None and state.generation == generation and state.phase == Phase.TRAINING for state in found
        )

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        self.cluster.wait_for(condition, SECONDS, what)


def _kill_worker(pod: PodProcess) -> bool:
    pid = pod.worker_pid()
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
    return pid is not None
