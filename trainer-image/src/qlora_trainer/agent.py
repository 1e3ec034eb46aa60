"""PID 1 of a trainer pod: keeps an agent process alive, reaps orphans, passes signals on.

    python -m qlora_trainer.agent

Processes: this one; the fork server with everything imported once (preload.py); forked from it the agent
(pod_agent.py) and, at the agent's word, the workers. An agent that crashes is forked again in milliseconds: the
container never restarts for it, no CrashLoopBackOff, the snapshots stay.

Rules: light (no torch here); only OK and STOPPED end the pod.
"""

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from qlora_api.run import ExitCode
from qlora_trainer import workers

_REAP_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 10.0
_STEADY_SECONDS = 60.0  # an agent that lived so long did not crash for how it starts


def start_agent() -> None:
    """The agent process's entry; its modules are in memory already."""
    from qlora_trainer import pod_agent

    pod_agent.main()


def supervise() -> int:
    """Until the agent ends well; returns the pod's exit code."""
    agent: ForkServerProcess | None = None

    def forward(number: int, _: object) -> None:
        if agent is None or agent.pid is None:
            os._exit(ExitCode.STOPPED)  # still importing: nothing to save
        os.kill(agent.pid, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([workers.PRELOAD])
    num_crashes = 0
    while True:
        started = time.monotonic()
        process = context.Process(target=start_agent)
        process.start()
        agent = process
        code = _await(process)
        if code in (ExitCode.OK, ExitCode.STOPPED):
            return code
        num_crashes = num_crashes + 1 if time.monotonic() - started < _STEADY_SECONDS else 0
        pause = min(_LONGEST_PAUSE_SECONDS, 0.1 * 2**num_crashes)
        print(f"the agent ended with {code}: starting it again in {pause:.1f} s", file=sys.stderr, flush=True)
        time.sleep(pause)


def _await(agent: ForkServerProcess) -> int:
    """Exit code of the agent; orphans that end meanwhile are reaped."""
    own = _children()  # fork server and resource tracker: multiprocessing waits for them itself
    while not wait([agent.sentinel], _REAP_SECONDS):
        for pid in _children() - own:
            os.waitpid(pid, os.WNOHANG)
    agent.join()
    assert agent.exitcode is not None
    return agent.exitcode


def _children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


if __name__ == "__main__":
    sys.exit(supervise())
