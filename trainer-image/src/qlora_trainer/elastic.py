"""torch elastic's own agent, with workers that are ended at once and ends that are explained.

Rules: it is used as it comes (`LocalElasticAgent`); here is only what it asks its implementers for: start, watch and
stop. Stopping is SIGKILL: a worker that could be stopped gently stands parked with its snapshot, any other hangs.
`max_restarts` is large and means nothing: the budget belongs to the operator.
"""

import multiprocessing
import os
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousHandler

from qlora_api.run import AgentState, ExitCode, Termination
from qlora_trainer.board import Board, killed
from qlora_trainer.control import clear_worker_files, read_termination
from qlora_trainer.workers import OutputPump, num_oom_kills, work

MONITOR_SECONDS = 0.05
EXIT_BARRIER_SECONDS = 10.0  # the store's host waits so long for its peers to end
_RESTARTS = 1_000_000


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

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        clear_worker_files(self._run_dir)
        for pump in self._pumps:
            pump.clear()
        self._num_oom_kills = num_oom_kills()
        ids: dict[int, Any] = super()._start_workers(worker_group)
        return ids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """As the parent, but one worker's end ends its siblings at once: they hang in a collective."""
        alive = multiprocessing.active_children()
        if 0 < len(alive) < worker_group.spec.local_world_size:
            _kill(alive)
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            self._explain(result)
        return result

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        _kill(multiprocessing.active_children())
        super()._stop_workers(worker_group)

    def _explain(self, result: RunResult) -> None:
        """Report why the workers ended; a stop that was asked for needs no explanation."""
        endings = []
        for rank, failure in result.failures.items():
            pump = self._pumps[failure.local_rank]
            termination = read_termination(self._run_dir, failure.local_rank)
            endings.append(termination or self._of_exit_code(failure.exitcode, rank, pump))
        if not endings or self._board.stopping:
            return
        cause = min(endings, key=lambda ending: ending.exit_code == ExitCode.LOST_PEER)
        self._board.set_state(AgentState.FAILED, cause)

    def _of_exit_code(self, exit_code: int, rank: int, pump: OutputPump) -> Termination:
        oom = num_oom_kills() > self._num_oom_kills
        code, reason, message = killed(exit_code, oom)
        worker = self._board.worker
        return Termination(
            exit_code=code,
            reason=reason,
            message=message,
            rank=rank,
            step=worker.progress.step if worker else 0,
            log_tail=pump.tail()[-3000:],
        )


def _kill(processes: list[Any]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join(5)
