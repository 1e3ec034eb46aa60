"""How a pod's worker processes come to life: preloaded in a fork server, tied to their agent, their output kept.

Rules: a worker never outlives its agent (nor an agent its fork server, nor that PID 1); whatever
it prints goes through the agent into the pod's log, and the last lines into its Termination.
"""

import ctypes
import faulthandler
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import NoReturn

from qlora_api.run import RUN_DIR
from qlora_trainer.control import ENV_GENERATION, ENV_RUN_DIR, read_control

PRELOAD = "qlora_trainer.preload"
ENV_WORKER = "QLORA_WORKER"  # module:function that trains and returns an exit code, where it is not train.run
ENV_WARM_UP = "QLORA_WARM_UP"  # module:function run once before the pod is let in, where it is not train.warm
DEFAULT_WORKER = "qlora_trainer.train:run"
DEFAULT_WARM_UP = "qlora_trainer.train:warm"
ENV_FLUSH = "QLORA_FLUSH"  # module:function run before the pod goes, where it is not flush.run
DEFAULT_FLUSH = "qlora_trainer.flush:run"
_PR_SET_PDEATHSIG = 1
_TAIL_PATIENCE_SECONDS = 0.5
_TAIL_BYTES = 6000


def die_with_parent() -> None:
    """SIGKILL for this process when the thread that started it ends. Linux only."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it ended before the call


def share_fork_server() -> None:
    """Fork from the server that this process was forked from.

    multiprocessing documents that for a server's children, and hands them its address, but starts another server all
    the same (CPython 3.11 to 3.14: `ensure_running` asks for a process id that only the first process knows).
    """
    assert multiprocessing.parent_process() is not None, "only for processes that come from a fork server"
    vars(forkserver)["_forkserver"].ensure_running = lambda: None


def die_with_agent() -> None:
    """As die_with_parent, and SIGKILL for this process when the agent that asked the fork server for it ends."""
    die_with_parent()
    agent = multiprocessing.parent_process()
    assert agent is not None

    def watch() -> None:
        wait([agent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="agent-watch", daemon=True).start()


def show_stacks_on_usr1() -> None:
    """Stacks of all threads on SIGUSR1 and on a crash: `kill -USR1` tells where a hanging process stands."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)


def work() -> None:
    """Entry point under torch elastic, in a process forked from the warm server."""
    die_with_agent()
    run_dir = _run_dir()
    _redirect_output(run_dir / f"log-{os.environ['LOCAL_RANK']}")
    show_stacks_on_usr1()
    os.environ[ENV_GENERATION] = str(read_control(run_dir).generation)
    code = _load(os.environ.get(ENV_WORKER, DEFAULT_WORKER))()
    if code:
        _end(code)  # at once: a thread of a broken collective must not keep the process


def warm_up() -> None:
    """Entry of a child: everything a worker needs that may take long, before the pod is let in."""
    _run_alone(os.environ.get(ENV_WARM_UP, DEFAULT_WARM_UP))


def flush() -> None:
    """Entry of a child: what must be durable before the pod goes."""
    _run_alone(os.environ.get(ENV_FLUSH, DEFAULT_FLUSH))


def _run_alone(name: str) -> None:
    die_with_agent()
    _redirect_output(_run_dir() / "log-0")
    _end(_load(name)() or 0)


def _run_dir() -> Path:
    """The pod's environment has it or the default holds: what the agent sets does not reach the fork server."""
    return Path(os.environ.get(ENV_RUN_DIR, RUN_DIR))


def _end(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _load(name: str) -> Callable[[], int | None]:
    module, _, function = name.partition(":")
    entry: Callable[[], int | None] = getattr(importlib.import_module(module), function)
    return entry


def _redirect_output(fifo: Path) -> None:
    with fifo.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


class OutputPump(threading.Thread):
    """Passes a worker's output on to the pod's log and remembers its end."""

    def __init__(self, run_dir: Path, local_rank: int) -> None:
        super().__init__(name=f"output-{local_rank}", daemon=True)
        path = run_dir / f"log-{local_rank}"
        path.unlink(missing_ok=True)
        os.mkfifo(path, 0o600)
        self._fd = os.open(path, os.O_RDWR)  # both ends: it never sees the end of the file
        self._tail = b""
        self._read_at = time.monotonic()

    def run(self) -> None:
        while chunk := os.read(self._fd, 65536):
            self._read_at = time.monotonic()
            self._tail = (self._tail + chunk)[-_TAIL_BYTES:]  # replaced whole: another thread reads and clears it
            try:
                os.write(2, chunk)
            except OSError:
                pass  # the container's log is gone; the tail stays useful

    def clear(self) -> None:
        """Forget the workers of the generation before."""
        self._tail = b""

    def tail(self, quiet_seconds: float = 0.02) -> str:
        """The last lines, once the worker has been quiet for a moment (it is dead by now; what it left may go on)."""
        end = time.monotonic() + _TAIL_PATIENCE_SECONDS
        while time.monotonic() - self._read_at < quiet_seconds and time.monotonic() < end:
            time.sleep(quiet_seconds / 4)
        return self._tail.decode(errors="replace")


def num_oom_kills() -> int:
    """How often the kernel killed a process of this container for memory; 0 where it can't be told."""
    for path in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        try:
            lines = Path(path).read_text().splitlines()
        except OSError:
            continue
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
    return 0
