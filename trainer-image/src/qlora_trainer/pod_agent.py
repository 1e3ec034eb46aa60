"""The agent of a trainer pod: warms up, joins generations, runs the workers, reports, and leaves in good order.

A thread talks to the coordinator (sync.py), one watches the files of the workers, one for each worker passes its
output on; the main thread belongs to torch elastic.

Rules: only OK and STOPPED end the pod. What can't be mended here is reported as FAILED, and the pod waits for the
operator's verdict. SIGTERM: LEAVING; the step is finished, a snapshot of it made durable, then the pod ends.
"""

import logging
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from qlora_api import run as contract
from qlora_api.names import Reason
from qlora_api.run import NEVER_RETRIED, AgentState, ExitCode, Termination
from qlora_trainer import elastic, faults, rendezvous, snapshot, workers
from qlora_trainer.board import Board, killed
from qlora_trainer.control import ENV_RUN_DIR, Phase, clear_worker_files, read_termination, read_worker_state
from qlora_trainer.sync import SyncThread
from qlora_trainer.workers import OutputPump

ENV_CONFIG = "QLORA_CONFIG"  # paths, where they are not those of a pod
ENV_TOKEN = "QLORA_TOKEN"
ENV_CA = "QLORA_CA"
ENV_TERMINATION = "QLORA_TERMINATION"
WATCH_SECONDS = 0.05
LEAVE_PATIENCE_SECONDS = 2.0  # then this pod parks its workers without the coordinator's word
FINISHED_SECONDS = 120.0  # a finished pod goes on reporting so long, unless it is ended before
STOPPED_SECONDS = 120.0  # the same for one that stopped because the run is suspended
_RETRY_SECONDS = (1.0, 5.0, 15.0, 30.0)

log = logging.getLogger("qlora.agent")


@dataclass(frozen=True)
class AgentEnv:
    """What the pod tells its agent."""

    url: str
    run_dir: Path
    address: str
    pod_uid: str
    num_workers: int
    token: Path
    ca: Path
    termination_path: Path

    @classmethod
    def of_environment(cls) -> "AgentEnv":
        """From QLORA_* and the mounted configuration; KeyError names a missing variable."""
        env = os.environ
        config = contract.parse_config(Path(env.get(ENV_CONFIG, contract.CONFIG_PATH)).read_text())
        path = contract.SYNC_PATH.format(namespace=config.run.namespace, name=config.run.name)
        return cls(
            url=env[contract.ENV_COORDINATOR].rstrip("/") + path,
            run_dir=Path(env.get(ENV_RUN_DIR, contract.RUN_DIR)),
            address=env[contract.ENV_POD_IP],
            pod_uid=env[contract.ENV_POD_UID],
            num_workers=config.spec.num_proc_per_node,
            token=Path(env.get(ENV_TOKEN, contract.TOKEN_PATH)),
            ca=Path(env.get(ENV_CA, contract.CA_PATH)),
            termination_path=Path(env.get(ENV_TERMINATION, contract.TERMINATION_PATH)),
        )


class Agent:
    """One life of the agent process."""

    def __init__(self, env: AgentEnv) -> None:
        self.env = env
        self.board = Board(env.run_dir, env.address, env.pod_uid)
        self.sync = SyncThread(env.url, env.token, env.ca, self.board.report, self.board.hear, self.board.urgent_read)
        self.pumps = [OutputPump(env.run_dir, rank) for rank in range(env.num_workers)]

    def run(self) -> ExitCode:
        """Until the run is finished or this pod must stop."""
        signal.signal(signal.SIGTERM, self._on_sigterm)
        clear_worker_files(self.env.run_dir)
        self.start_threads()
        self._warm_up()
        while not self.board.stopping:
            if self._train():
                return self._finish()
        return self._leave()

    def start_threads(self) -> None:
        """Report, watch, pass output on."""
        for thread in (self.sync, *self.pumps, threading.Thread(target=self._watch, name="watch", daemon=True)):
            thread.start()

    def _warm_up(self) -> None:
        """Fork server, model and data in the cache; retried until it succeeds or the pod is told to stop."""
        context = multiprocessing.get_context("forkserver")  # the one that this process comes from
        attempt = 0
        while not self.board.stopping:
            child = context.Process(target=workers.warm_up)
            child.start()

            faults.reach("warm-up")
            while child.is_alive() and not self.board.stopping:
                child.join(0.2)
            if child.exitcode == 0:
                return
            child.kill()
            if self.board.stopping:
                return  # ended here, not failed
            self._fail_warm_up(child.exitcode, _RETRY_SECONDS[min(attempt, len(_RETRY_SECONDS) - 1)])
            attempt += 1

    def _fail_warm_up(self, exit_code: int | None, pause: float) -> None:
        """Report; wait for the verdict when trying again is useless, else a while."""
        termination = read_termination(self.env.run_dir, 0)
        if termination is None:
            code, reason, message = killed(exit_code or ExitCode.INTERNAL, oom=False)
            tail = self.pumps[0].tail()[-3000:]
            termination = Termination(exit_code=code, reason=reason, message=message, log_tail=tail)
        log.error("warm-up failed: %s: %s", termination.reason, termination.message)
        self.board.set_state(AgentState.FAILED, termination)
        write_termination_message(self.env.termination_path, termination.model_dump_json(by_alias=True))
        final = termination.exit_code in NEVER_RETRIED
        deadline = time.monotonic() + pause
        while not self.board.stopping and (final or time.monotonic() < deadline):
            time.sleep(0.1)
        clear_worker_files(self.env.run_dir)
        self.board.set_state(AgentState.WARMING)

    def _train(self) -> bool:
        """torch elastic from here until it gives up; True when the run is finished."""
        try:
            result = self._node_agent().run()
        except Exception as error:  # the outermost loop: nothing that torch elastic raises may end the pod
            log.exception("torch elastic gave up: standing again")
            message = f"torch elastic: {type(error).__name__}: {error}"[:3000]
            lost = Termination(exit_code=ExitCode.LOST_PEER, reason=Reason.LOST_PEER, message=message)
            self.board.set_state(AgentState.FAILED, lost)
            time.sleep(0.2)
            return False
        worker = read_worker_state(self.env.run_dir, 0)
        return result is not None and not result.is_failed() and worker is not None and worker.phase == Phase.FINISHED

    def _node_agent(self) -> elastic.NodeAgent:
        self.board.set_snapshot_step(snapshot.newest_step(self.env.run_dir))
        os.environ["TORCH_ELASTIC_WORKER_IDENTICAL"] = "1"  # ranks follow from the generation: no exchange needed
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGHUP"  # SIGTERM is ours
        handler = rendezvous.QloraRendezvous(self.board, self.env.pod_uid, self.env.num_workers)
        return elastic.NodeAgent(self.board, handler, self.env.run_dir, self.env.num_workers, self.pumps)

    def _finish(self) -> ExitCode:
        """Go on reporting until the pod is ended: the operator learns of the artifacts even if it is away now."""
        self.board.set_state(AgentState.FINISHED)
        deadline = time.monotonic() + FINISHED_SECONDS
        while not self.board.stopping and time.monotonic() < deadline:
            time.sleep(0.1)
        self.sync.end(2.0)
        return ExitCode.OK

    def _leave(self) -> ExitCode:
        """Told to stop: make the snapshot durable, tell so, go when the pod is ended."""
        self._flush()
        stopped = Termination(exit_code=ExitCode.STOPPED, reason=Reason.SUSPENDING, message="stopped; all is saved")
        self.board.set_state(AgentState.LEAVING, stopped)
        write_termination_message(self.env.termination_path, stopped.model_dump_json(by_alias=True))
        deadline = time.monotonic() + STOPPED_SECONDS
        while not self.board.leaving and time.monotonic() < deadline:
            time.sleep(0.1)  # the kubelet would only start a container again that ends by itself
        self.sync.end(1.0)
        return ExitCode.STOPPED

    def _flush(self) -> None:
        """In a child; what it could not save is told in the log and lost with the pod."""
        child = multiprocessing.get_context("forkserver").Process(target=workers.flush)
        child.start()
        child.join()
        if child.exitcode:
            termination = read_termination(self.env.run_dir, 0)
            log.error("the snapshot is not durable: %s", termination.message if termination else child.exitcode)

    def _watch(self) -> None:
        """Thread: the workers' files onto the board, and leaving without a coordinator."""
        seen: dict[int, int] = {}
        leave_by: float | None = None
        while True:
            time.sleep(WATCH_SECONDS)
            for local_rank in range(self.env.num_workers):
                stamp = _stamp(self.env.run_dir / f"worker-{local_rank}.json")
                if (
                    stamp
                    and seen.get(local_rank) != stamp
                    and (state := read_worker_state(self.env.run_dir, local_rank))
                ):
                    seen[local_rank] = stamp
                    self.board.watch(local_rank, state)
            if self.board.leaving:
                leave_by = leave_by or time.monotonic() + LEAVE_PATIENCE_SECONDS
                if len(self.board.view.members) <= 1 or time.monotonic() > leave_by:
                    self.board.force_park()

    def _on_sigterm(self, *_: object) -> None:
        if self.board.state == AgentState.WARMING and snapshot.newest_step(self.env.run_dir) is None:
            os._exit(ExitCode.STOPPED)  # nothing to save: an agent that crashed would have left snapshots
        self.board.request_leave()


def write_termination_message(path: Path, text: str) -> None:
    """The termination message is a help, not a duty: its file may be a mount that can't be replaced."""
    try:
        path.write_text(text[:4096])
    except OSError as error:
        log.warning("no termination message: %s", error)


def _crash(failure: threading.ExceptHookArgs) -> None:
    """A thread that ends by an error would leave an agent that is deaf or blind."""
    log.critical("thread %s crashed", failure.thread, exc_info=failure.exc_value)
    os._exit(ExitCode.INTERNAL)


def main() -> None:
    """In a process forked from the warm server; ends with the pod's exit code, or INTERNAL to be started again."""
    code: int = ExitCode.INTERNAL
    try:
        workers.die_with_parent()
        threading.excepthook = _crash
        workers.share_fork_server()
        workers.show_stacks_on_usr1()
        level = os.environ.get("QLORA_LOG_LEVEL", "INFO")
        logging.basicConfig(level=level, format="%(asctime)s %(levelname).1s %(name)s: %(message)s")
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # ends are explained in elastic.py
        env = AgentEnv.of_environment()
        env.run_dir.mkdir(parents=True, exist_ok=True)
        (env.run_dir / "agent.pid").write_text(str(os.getpid()))
        code = Agent(env).run()
    except BaseException:  # the outermost loop: PID 1 starts the agent again
        log.exception("the agent crashed")
    finally:
        os._exit(code)


def _stamp(path: Path) -> int:
    """When the file was written, in ns; 0 when it is not there (it may go between two looks)."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
