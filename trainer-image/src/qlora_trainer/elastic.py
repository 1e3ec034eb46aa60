"""torch elastic's own agent, with workers that go on or are ended at once, and ends that are explained.

Rules: it is used as it comes (`LocalElasticAgent`); here is only what it asks its implementers for: start, watch and
stop. To stop workers that stand parked is to let them stand, to start them is to give them their places; any others
hang or have failed, and are ended by SIGKILL.
`max_restarts` is large and means nothing: the budget belongs to the operator.
"""

import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousHandler

from qlora_api.names import Reason
from qlora_api.run import AgentState, ExitCode, Termination
from qlora_trainer.board import Board, killed
from qlora_trainer.control import (
    Assignment,
    Phase,
    clear_worker_files,
    has_gpu,
    read_termination,
    read_worker_state,
    write_assignment,
    write_termination,
)
from qlora_trainer.workers import OutputPump, num_oom_kills, work

ENV_STAND = "QLORA_STAND"  # "0": every generation gets new workers
MONITOR_SECONDS = 0.05
TAKE_SECONDS = 5.0  # for a standing worker to take its place: it looks fifty times a second
EXIT_BARRIER_SECONDS = 10.0  # the store's host waits so long for its peers to end
_RESTARTS = 1_000_000

log = logging.getLogger(__name__)


class NodeAgent(LocalElasticAgent):
    """Runs this pod's workers from generation to generation until they succeed or the pod must stop."""

    def __init__(
        self, board: Board, handler: RendezvousHandler, run_dir: Path, num_workers: int, pumps: list[OutputPump]
    ) -> None:
        spec = WorkerSpec(
            role="trainer",
            local_world_size=num_workers,
            rdzv_handler=handler,
            entrypoint=work,
            max_restarts=_RESTARTS,
            monitor_interval=MONITOR_SECONDS,
        )
        super().__init__(
            spec,
            DefaultLogsSpecs(log_dir=os.devnull),
            start_method="forkserver",
            exit_barrier_timeout=EXIT_BARRIER_SECONDS,
        )
        self._board, self._run_dir, self._pumps = board, run_dir, pumps
        self._num_oom_kills = num_oom_kills()
        self._standing = False  # the workers wait for a place in the next generation
        self._assigned_at: float | None = None  # they were given one, and have not said a word since
        self._processes: list[Any] = []  # when all lived
        self._first_dead: set[int] = set()  # local ranks that ended before their siblings were ended for it
        self._stands = os.environ.get(ENV_STAND) != "0"
        if self._stands:
            board.assign_places(can_abandon=has_gpu())

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        clear_worker_files(self._run_dir)
        if self._standing and self._all_alive():
            self._standing, self._assigned_at, self._first_dead = False, time.monotonic(), set()
            return self._assign(worker_group)
        for pump in self._pumps:
            pump.clear()
        self._num_oom_kills, self._first_dead = num_oom_kills(), set()
        self._end_workers(worker_group)  # those that stood and did not live to go on
        ids: dict[int, Any] = super()._start_workers(worker_group)
        return ids

    def _assign(self, worker_group: WorkerGroup) -> dict[int, Any]:
        """Workers that stand get their places in the new generation."""
        for worker in worker_group.workers:
            place = Assignment(
                generation=self._board.joined,
                rank=worker.global_rank,
                world_size=worker.world_size,
                master_addr=worker_group.master_addr,
                master_port=worker_group.master_port,
            )
            write_assignment(self._run_dir, worker.local_rank, place)
        assert self._pcontext is not None, "workers stand, so they were started"
        ids: dict[int, Any] = self._pcontext.pids()
        return ids

    def _all_alive(self) -> bool:
        return len(multiprocessing.active_children()) == self._worker_group.spec.local_world_size

    def _all_parked(self) -> bool:
        """All alive, out of their group, waiting for another place."""
        states = [read_worker_state(self._run_dir, rank) for rank in range(self._worker_group.spec.local_world_size)]
        return self._all_alive() and all(
            state is not None and (state.phase, state.generation) == (Phase.PARKED, self._board.joined)
            for state in states
        )

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """As the parent, but one worker's end ends its siblings at once: they hang in a collective."""
        alive = multiprocessing.active_children()
        if len(alive) == worker_group.spec.local_world_size:
            self._processes = alive
            if self._assigned_at is not None:
                self._await_takers(alive)
        elif alive and self._pcontext is not None:
            living = {process.pid for process in alive}
            self._first_dead = {rank for rank, pid in self._pcontext.pids().items() if pid not in living}
            _kill(alive)
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            self._explain(result)
        return result

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        """Parked workers stay for the next generation; whatever else they do, it is not what was wanted of them."""
        self._standing = self._stands and not self._board.stopping and self._all_parked()
        if not self._standing:
            self._end_workers(worker_group)
            return
        said = [read_termination(self._run_dir, rank) for rank in range(worker_group.spec.local_world_size)]
        if cause := next(filter(None, said), None):
            self._board.set_state(AgentState.FAILED, cause)  # they lost a peer, and the operator wants to know

    def _end_workers(self, worker_group: WorkerGroup) -> None:
        self._standing, self._assigned_at = False, None
        _kill(multiprocessing.active_children())
        super()._stop_workers(worker_group)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        """As the parent, which would wait `timeout` seconds for a worker that stands still."""
        _kill(multiprocessing.active_children())
        super()._shutdown(death_sig, timeout)

    def _await_takers(self, alive: list[Any]) -> None:
        """Workers that don't take their places in time are replaced by new ones; nobody is to blame."""
        assert self._assigned_at is not None
        states = [read_worker_state(self._run_dir, rank) for rank in range(len(alive))]
        if all(state is not None and state.generation == self._board.joined for state in states):
            self._assigned_at = None
        elif time.monotonic() - self._assigned_at > TAKE_SECONDS:
            message = f"not every worker took its place in generation {self._board.joined} within {TAKE_SECONDS} s"
            lost = Termination(exit_code=ExitCode.LOST_PEER, reason=Reason.LOST_PEER, message=message)
            for rank in range(len(alive)):
                write_termination(self._run_dir, rank, lost)
            _kill(alive)

    def _explain(self, result: RunResult) -> None:
        """Report why the workers ended; a stop that was asked for needs no explanation."""
        if self._board.stopping:
            return
        endings = []
        for local_rank in sorted(self._first_dead or {failure.local_rank for failure in result.failures.values()}):
            endings.append(read_termination(self._run_dir, local_rank) or self._of_exit_code(local_rank, result))
        if not endings:
            return
        cause = min(endings, key=lambda ending: ending.exit_code == ExitCode.LOST_PEER)
        if self._board.joined == 0:
            log.warning("the rehearsal failed, the first generation decides: %s: %s", cause.reason, cause.message)
            return
        self._board.set_state(AgentState.FAILED, cause)

    def _of_exit_code(self, local_rank: int, result: RunResult) -> Termination:
        """Of a worker that ended without a word."""
        code, reason, message = killed(self._exit_code(local_rank, result), num_oom_kills() > self._num_oom_kills)
        worker = self._board.worker
        return Termination(
            exit_code=code,
            reason=reason,
            message=message,
            rank=self._worker_group.workers[local_rank].global_rank,
            step=worker.progress.step if worker else 0,
            log_tail=self._pumps[local_rank].tail()[-3000:],
        )

    def _exit_code(self, local_rank: int, result: RunResult) -> int:
        """torch tells of one failure, which may be a sibling that was ended here; the processes know their own."""
        pid = self._pcontext.pids().get(local_rank) if self._pcontext is not None else None
        own = [process.exitcode for process in self._processes if process.pid == pid]
        told = [failure.exitcode for failure in result.failures.values() if failure.local_rank == local_rank]
        return int(next((code for code in own + told if code is not None), ExitCode.INTERNAL))


def _kill(processes: list[Any]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join(5)
