"""What a pod's agent knows and tells: one board between torch elastic, the sync thread and the watcher of workers.

Rules: everything goes through the board's lock; `changed` wakes whoever waits for a membership, `urgent` whoever
reports; control.json says at any moment what the board wants of the workers. No I/O but control.json, no torch.
"""

import os
import threading
import time
from collections import deque
from pathlib import Path

from qlora_api.names import Reason
from qlora_api.run import METRIC_STEP_WORK, AgentState, Command, ExitCode, Membership, Report, Termination
from qlora_trainer.control import Control, Phase, WorkerState, write_control

PARK_FLOOR_SECONDS = 1.0
PARK_STEPS = 2.0  # a worker that is not at a step boundary after so many median steps waits for a lost peer
PARK_UNTIMED_SECONDS = 10.0  # before a step was timed: as long as a new worker in its place would take to start
ABANDON_SECONDS = 2.0  # for one that can break its collectives off (NCCL's) and park
_KEPT_STEPS = 16


class Board:
    """State of one agent. `rank` is the index of this pod in the generation that it joined."""

    def __init__(self, run_dir: Path, address: str, pod_uid: str) -> None:
        self.changed = threading.Condition()
        self.view = Membership()
        self.state = AgentState.WARMING
        self.joined = 0
        self.termination: Termination | None = None
        self.urgent_read, self._urgent_write = os.pipe()
        os.set_blocking(self._urgent_write, False)
        os.set_blocking(self.urgent_read, False)
        self._run_dir, self._address, self._pod_uid = run_dir, address, pod_uid
        self._floor = 0  # only a newer generation is joined
        self._heard = False
        self._leave_requested = False
        self._worker: WorkerState | None = None
        self._snapshot_step: int | None = None
        self._phases: dict[int, Phase] = {}  # by local rank
        self._assigns = False  # workers that stand get a place in the next generation
        self._abandon_for = 0.0  # seconds that workers get to break their collectives off
        self._abandon = False
        self._step_seconds: deque[tuple[float, int]] = deque(maxlen=_KEPT_STEPS)  # with how many nodes shared it
        self._step_time = time.monotonic()
        self._num_nodes = 1  # of the generation that it joined
        self._wanted_since: float | None = None  # when the workers were first asked to park
        self._force_park = False
        self._change: tuple[int, float] | None = None  # the generation that ends, when that was first heard of
        self._metrics: dict[str, float] = {}
        self._work_seconds: dict[int, float] = {}  # by local rank
        self._told: Control | None = None

    # what the sync thread does

    def report(self, wait_seconds: float) -> Report:
        """The newest report; held open `wait_seconds` while nothing changes."""
        with self.changed:
            worker = self._worker
            return Report(
                address=self._address,
                state=AgentState.LEAVING if self.leaving and self.state != AgentState.FINISHED else self.state,
                generation=self.joined,
                known_generation=self.view.generation,
                known_prepare=self.view.prepare,
                known_command=self.view.command,
                wait_seconds=wait_seconds,
                progress=worker.progress if worker else None,
                activity=worker.activity if worker else None,
                snapshot_step=self.snapshot_step,
                checkpoint=worker.checkpoint if worker else None,
                artifacts=worker.artifacts if worker else None,
                termination=self.termination,
                metrics={**(worker.metrics if worker else {}), **self._slowest_work(), **self._metrics},
                plan=worker.plan if worker else None,
            )

    def hear(self, view: Membership) -> None:
        """A membership from the coordinator. An older one than known changes nothing."""
        with self.changed:
            if view.generation < self.view.generation:
                return
            if not self._heard:
                self._heard, self._floor = True, max(self._floor, view.generation)
            self.view = view
            if view.prepare > self.joined:
                self._note_change()
            elif self.state == AgentState.RUNNING and self._change and self._change[0] == self.joined:
                self._change = None  # it was called off
            self._tell_workers()
            self.changed.notify_all()

    # what the signal handler and the main thread do

    def request_leave(self) -> None:
        """SIGTERM. Takes no lock: a signal handler runs in the middle of anything."""
        self._leave_requested = True
        self.hurry()

    def hurry(self) -> None:
        """Report now."""
        try:
            os.write(self._urgent_write, b".")
        except BlockingIOError:
            pass  # it has been told already

    @property
    def leaving(self) -> bool:
        return self._leave_requested

    @property
    def stopping(self) -> bool:
        """This pod must not join another generation."""
        return self._leave_requested or self.view.command == Command.STOP

    @property
    def snapshot_step(self) -> int | None:
        return self._worker.snapshot_step if self._worker else self._snapshot_step

    @property
    def worker(self) -> WorkerState | None:
        return self._worker

    def set_state(self, state: AgentState, termination: Termination | None = None) -> None:
        """Change the reported state at once."""
        with self.changed:
            self.state = state
            if state != AgentState.RUNNING:
                self._note_change()
            self.termination = termination or self.termination
            self.changed.notify_all()
        self.hurry()

    @property
    def assigns(self) -> bool:
        """Whether workers that stand get places here."""
        return self._assigns

    def assign_places(self, can_abandon: bool) -> None:
        """Workers that stand go on in the next generation; `can_abandon`: also those that a lost peer holds up."""
        with self.changed:
            self._assigns, self._abandon_for = True, ABANDON_SECONDS if can_abandon else 0.0
            self._tell_workers()

    def set_snapshot_step(self, step: int | None) -> None:
        """What the memory tier holds before this agent's first worker."""
        with self.changed:
            self._snapshot_step = step

    def set_metric(self, name: str, value: float) -> None:
        """The agent's own: reported, and told to the workers for the run's report."""
        with self.changed:
            self._metrics[name] = value
            self._tell_workers()

    def force_park(self) -> None:
        """Ask the workers for a step boundary though the coordinator has not (it is silent, or nobody is left)."""
        with self.changed:
            self._force_park = True
            self._tell_workers()

    def await_generation(self, timeout: float) -> tuple[int, int, Membership] | None:
        """(generation, rank, membership) of the next generation with this pod, or None after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with self.changed:
            while not self.stopping:
                rank = self._rank()
                if rank is not None:
                    return self.view.generation, rank, self.view
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self.changed.wait(left)
            return None

    def join(self, generation: int) -> None:
        """This pod's workers are about to start under `generation`."""
        with self.changed:
            self.joined = self._floor = generation
            self.state, self.termination = AgentState.RUNNING, None
            self._snapshot_step, self._worker = self.snapshot_step, None
            self._phases, self._wanted_since, self._force_park, self._abandon = {}, None, False, False
            self._num_nodes = max(1, len(self.view.members))
            self._work_seconds.clear()
            self._tell_workers()
        self.hurry()

    def superseded(self) -> bool:
        """A newer generation than the joined one is under way, or this pod must stop."""
        return self.view.prepare > self.joined or self.stopping

    # what the watcher does

    def watch(self, local_rank: int, worker: WorkerState) -> None:
        """A worker's state file of this generation was read."""
        with self.changed:
            if worker.generation != self.joined:
                return
            self._phases[local_rank] = worker.phase
            if self.joined == 0:
                return  # no member yet: a rehearsal is nobody's progress
            if METRIC_STEP_WORK in worker.metrics:
                self._work_seconds[local_rank] = worker.metrics[METRIC_STEP_WORK]
            if local_rank != 0:
                return
            self._time_steps(worker)
            self._worker = worker

    def _time_steps(self, worker: WorkerState) -> None:
        """From one step that was told to the next; what a worker restores on its way in is no step."""
        before, now = self._worker, time.monotonic()
        trains = before is not None and before.phase == Phase.TRAINING
        num_steps = worker.progress.step - before.progress.step if before else 0
        if trains and num_steps > 0:
            self._step_seconds.append(((now - self._step_time) / num_steps, self._num_nodes))
        if not trains or num_steps:
            self._step_time = now
        if "step_seconds" in worker.metrics and self._change and self._change[0] < self.joined:
            self.set_metric("restart_seconds", now - self._change[1])
            self._change = None

    def _note_change(self) -> None:
        """The generation that this pod is in comes to its end; the first word of it counts."""
        if self.joined and self._change is None:
            self._change = self.joined, time.monotonic()

    def _slowest_work(self) -> dict[str, float]:
        """Of all measures of a pod's workers this one is its slowest worker's, not its first's."""
        return {METRIC_STEP_WORK: max(self._work_seconds.values())} if self._work_seconds else {}

    def may_end_workers(self, num_workers: int) -> bool:
        """Whether the workers can be ended now, or stand: parked, or too late to; those that hang are told to abandon.

        They park when they are asked to, or when one of them has lost a peer.
        """
        with self.changed:
            phases = [self._phases.get(rank) for rank in range(num_workers)]
            one_parked = Phase.PARKED in phases
            at_rest = all(phase in (Phase.PARKED, Phase.FINISHED) for phase in phases)
            if one_parked and at_rest:
                return True  # perhaps another member wanted it; the coordinator will tell why
            if self.joined == 0:
                return self.stopping  # they rehearse
            if not (one_parked or self._wants_park()):
                return False
            if self._wanted_since is None:
                self._wanted_since = time.monotonic()
            late = time.monotonic() - self._wanted_since - self._park_seconds()
            if late > 0 and self._abandon_for and not self._abandon:
                self._abandon = True
                self._tell_workers()
            starting = self._worker is None or self._worker.phase == Phase.STARTING
            return at_rest or starting or late > self._abandon_for

    def _park_seconds(self) -> float:
        """By steps of older generations, too: fewer nodes take longer for the same batch, more never longer."""
        steps = sorted(seconds * max(1.0, nodes / self._num_nodes) for seconds, nodes in self._step_seconds)
        if not steps:
            return PARK_UNTIMED_SECONDS
        return max(PARK_FLOOR_SECONDS, PARK_STEPS * steps[len(steps) // 2])

    def _wants_park(self) -> bool:
        return self._force_park or self.view.prepare > self.joined

    def _rank(self) -> int | None:
        if self.view.generation <= self._floor:
            return None
        uids = [member.pod_uid for member in self.view.members]
        return uids.index(self._pod_uid) if self._pod_uid in uids else None

    def _tell_workers(self) -> None:
        prepare = self.joined + 1 if self._force_park else max(self.joined, self.view.prepare)
        control = Control(
            generation=self.joined,
            prepare=prepare,
            command=self.view.command,
            abandon=self._abandon,
            assigns=self._assigns,
            metrics=self._metrics,
        )
        if control != self._told:
            write_control(self._run_dir, control)
            self._told = control


def killed(exit_code: int, oom: bool) -> tuple[int, str, str]:
    """(exit code, reason, message) of a worker that ended without a word; `oom`: the kernel killed for memory."""
    if oom:
        hint = (
            "raise resourcesPerNode.limits.memory, lower training.microBatchSize, shard over more nodes with"
            " training.shardingStrategy: FULL_SHARD or set training.cpuOffload: false"
        )
        return ExitCode.OUT_OF_MEMORY, Reason.OUT_OF_MEMORY, f"the kernel killed the worker for memory: {hint}"
    if exit_code < 0:
        return 128 - exit_code, Reason.WORKER_FAILED, f"the worker was killed by signal {-exit_code}"
    return exit_code, Reason.WORKER_FAILED, f"the worker ended with exit code {exit_code}"
