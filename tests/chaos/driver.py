"""Carries one cell out against a running cluster: holds the victims at the point, strikes, measures the recovery."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from tests.chaos.cells import Cell
from tests.chaos.faultplan import FaultPlan

from qlora_api.status import QLoRAFinetuneStatus
from qlora_trainer.control import Phase, WorkerState, read_worker_state

SECONDS = 240.0  # for anything: far beyond what is measured, on a busy machine, too
POLL_SECONDS = 0.005
CHECKPOINT_STEPS = 10  # checkpoint.intervalSteps of the runs that are struck
FROZEN_SECONDS = 4.0  # longer than a lease


class StruckPod(Protocol):
    """What the driver asks of a pod, wherever it runs."""

    @property
    def name(self) -> str: ...

    @property
    def run_dir(self) -> Path: ...

    def kill_worker(self) -> bool: ...


P = TypeVar("P", bound=StruckPod)


class StruckCluster(Protocol[P]):
    """What the driver asks of a cluster: processes on loopback (local.py) or Kubernetes (kube.py)."""

    @property
    def status(self) -> QLoRAFinetuneStatus: ...

    @property
    def pods(self) -> Mapping[str, P]: ...

    def members(self) -> Sequence[P]: ...

    def resize(self, size: int) -> None: ...

    def limit(self, size: int) -> None: ...

    def strike(self, cell: Cell, pods: Sequence[P]) -> None: ...

    def restore(self, pods: Sequence[P]) -> None: ...

    def wait_for(self, condition: Callable[[], bool], seconds: float, what: str) -> None: ...

    def describe(self) -> str: ...


@dataclass(frozen=True)
class Outcome:
    """What a cell cost."""

    cell: Cell
    steps_lost: int
    seconds: float | None  # from the fault to the first new step; None: training never stopped
    generations: int


class Driver(Generic[P]):
    """Strikes at one cluster whose workers read `plan`."""

    def __init__(self, cluster: StruckCluster[P], plan: FaultPlan) -> None:
        self.cluster, self._plan = cluster, plan

    def run(self, cell: Cell) -> Outcome:
        """Carry the cell out; AssertionError when the run does not recover."""
        self.bring_to(cell.size)
        if cell.point == "warm-up":
            return self._strike_newcomer(cell)
        members = self.cluster.members()
        victims = [members[rank] for rank in cell.victims()]
        generation = self.cluster.status.generation
        if cell.point == "rendezvous":
            fault, number = self._plan.hold({"point": cell.point}, [victim.name for victim in victims]), len(victims)
            members[0].kill_worker()
        else:
            holders = [0] if cell.point == "manifest" else list(cell.victims())
            where = {"point": cell.point, "step": self._moment(cell.point), "ranks": holders}
            fault, number = self._plan.hold(where), len(holders)
        self._wait(lambda: self._plan.num_held(fault) >= number, f"{cell} to reach its point")
        return self._measure(cell, victims, generation, fault)

    def bring_to(self, size: int) -> None:
        """`size` members that all train, one step on."""
        self.cluster.resize(size)

        def arrived() -> bool:
            self.cluster.limit(size)
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

    def _measure(self, cell: Cell, victims: list[P], generation: int, fault: str) -> Outcome:
        before = self.step()
        struck = time.monotonic()
        self.cluster.strike(cell, victims)
        self._plan.release(fault)
        resumed, seconds = self._await_step(generation, struck, cell, victims)
        return Outcome(cell, max(0, before - resumed), seconds, self.cluster.status.generation - generation)

    def _strike_newcomer(self, cell: Cell) -> Outcome:
        """Hold a newcomer in its warm-up and hit it, or others at that moment."""
        members, generation = self.cluster.members(), self.cluster.status.generation
        known = set(self.cluster.pods)
        fault = self._plan.hold({"point": cell.point})
        self.cluster.resize(cell.size + 1)
        self._wait(lambda: self._plan.num_held(fault) >= 1, f"{cell} to reach its point")
        newcomers = [pod for name, pod in self.cluster.pods.items() if name not in known]
        chosen = {"rank 0": members[:1], "other": newcomers, "two": [*members[:1], *newcomers]}
        victims = list(chosen.get(cell.who, [*members, *newcomers]))
        self.cluster.resize(cell.size)
        if {pod.name for pod in victims} - {pod.name for pod in newcomers}:
            return self._measure(cell, victims, generation, fault)
        before = self.step()
        self.cluster.strike(cell, victims)
        self._wait(lambda: self.step() > before + 2, "steps without the newcomer")
        self._plan.release(fault)
        self.cluster.restore(victims)
        return Outcome(cell, 0, None, self.cluster.status.generation - generation)

    def _await_step(self, generation: int, struck: float, cell: Cell, victims: list[P]) -> tuple[int, float]:
        """(step at which a newer generation began, seconds until it did the next).

        Where nobody is spared nothing can go on before some victims are given back; if they only stood still, their
        own generation may go on.
        """
        began: dict[int, int] = {}
        restored = not cell.hits_all
        deadline = struck + SECONDS
        while time.monotonic() < deadline:
            if not restored and time.monotonic() > struck + FROZEN_SECONDS:
                self.cluster.restore(victims)
                restored = True
            same_counts = cell.hits_all and cell.stands_still and restored
            for state in self.states():
                newer = state.generation > generation or same_counts
                if not newer or state.phase not in (Phase.TRAINING, Phase.PARKED, Phase.FINISHED):
                    continue
                first = began.setdefault(state.generation, state.progress.step)
                if state.progress.step > first:
                    seconds = time.monotonic() - struck
                    self.cluster.restore(victims)
                    return first, seconds
            time.sleep(POLL_SECONDS)
        raise AssertionError(f"{cell}: no new step within {SECONDS} s\n{self.cluster.describe()}")

    def _moment(self, point: str) -> int:
        """The next step at which the point is reached, a little ahead."""
        ahead = self.step() + 3
        return -(-ahead // CHECKPOINT_STEPS) * CHECKPOINT_STEPS if point in ("upload", "manifest") else ahead

    def _is_training(self, size: int) -> bool:
        generation = self.cluster.status.generation
        members = self.cluster.members()
        found = [read_worker_state(pod.run_dir, 0) for pod in members]
        return len(members) == size == len(self.cluster.status.members) and all(
            state is not None and state.generation == generation and state.phase == Phase.TRAINING for state in found
        )

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        self.cluster.wait_for(condition, SECONDS, what)
