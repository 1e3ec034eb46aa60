"""Pods forked from one warm process, so that a grid of hundreds of faults needs the imports once.

The difference to a real pod: PID 1, agent and workers come from the tests' fork server instead of the pod's own.
All of a pod's processes share a process group, so it can be killed or frozen whole.
"""

import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_trainer import agent, elastic, pod_agent, workers

_GROUP, _ENVIRONMENT = "CHAOS_GROUP", "CHAOS_ENVIRONMENT"


def start_zygote() -> None:
    """Call once, from the main thread, with the environment that the workers' modules need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([workers.PRELOAD, __name__])
    first = context.Process(target=os.getpid)
    first.start()
    first.join()  # now everything is imported


class ForkedPod:
    """The few methods of subprocess.Popen that a pod needs."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=_pid_1, args=(environment, str(log)))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> None:
        self._process.join()

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)


class InPod:
    """A function as one of the pod's processes runs it: in the pod's environment and process group. Found by name:
    it stands in the place of the function itself."""

    def __init__(self, function: Callable[..., Any], environment: dict[str, str]) -> None:
        self.__qualname__ = self.__name__ = function.__qualname__
        self._module, self._environment = function.__module__, environment

    def __call__(self, *args: Any) -> Any:
        os.environ.update(self._environment)
        try:
            os.setpgid(0, int(self._environment[_GROUP]))
        except PermissionError:
            os._exit(1)  # the pod was killed while this process began
        tempfile.tempdir = None
        return getattr(importlib.import_module(self._module), self.__name__)(*args)


def _pid_1(environment: dict[str, str], log: str) -> None:
    workers.die_with_parent()
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    environment = {**environment, _GROUP: str(os.getpid())}
    workers.share_fork_server()
    os.environ.update(environment, **{_ENVIRONMENT: json.dumps(environment)})
    vars(agent)["start_agent"] = InPod(_agent, {**environment, _ENVIRONMENT: json.dumps(environment)})
    sys.exit(agent.supervise())


def _agent() -> None:
    environment = json.loads(os.environ[_ENVIRONMENT])
    vars(elastic)["work"] = InPod(workers.work, environment)
    vars(workers)["warm_up"] = InPod(workers.warm_up, environment)
    vars(workers)["flush"] = InPod(workers.flush, environment)
    log = os.open(environment["CHAOS_LOG"], os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    pod_agent.main()
