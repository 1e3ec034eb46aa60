"""Follow a run: every state that the API server tells, as a line for people.

Rules: the stream is `kubectl get --watch`, restarted when it ends; nothing is polled; the last state seen is kept.
"""

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from hack.demo.kubectl import Kubectl, program

Run = dict[str, Any]
TERMINAL = ("Succeeded", "Failed")


class RunWatch:
    """The states of one run, newest last. Use as a context manager: it owns a kubectl process."""

    def __init__(self, kubectl: Kubectl, name: str) -> None:
        self._kubectl, self._name = kubectl, name
        self._states: queue.SimpleQueue[Run] = queue.SimpleQueue()
        self._closed = False
        self._process: subprocess.Popen[str] | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> "RunWatch":
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        if self._process:
            self._process.terminate()
        self._reader.join(5)

    def states(self, timeout: float) -> Iterator[Run]:
        """Every state until the timeout (seconds, from now) is over; about once a second also the newest one again."""
        deadline, newest = time.monotonic() + timeout, None
        while (left := deadline - time.monotonic()) > 0:
            try:
                newest = self._states.get(timeout=min(1.0, left))
            except queue.Empty:
                if newest is None:
                    continue
            yield newest

    def until(self, what: str, check: Callable[[Run], Any], timeout: float, tell: Callable[[Run], None]) -> Run:
        """The first state that passes the check.

        Raises:
            TimeoutError: none came in time; says what was waited for and how the run stood.
            RuntimeError: the run failed before; says why.
        """
        state: Run = {}
        for state in self.states(timeout):
            tell(state)
            if check(state):
                return state
            if word(state) == "Failed":
                raise RuntimeError(f"the run failed: {describe(state)}")
        raise TimeoutError(f"{what}: not within {timeout:.0f} s; {describe(state)}")

    def _read(self) -> None:
        while not self._closed:
            command = [program("kubectl"), "-n", self._kubectl.namespace, "get", "qft", self._name, "-w", "-o", "json"]
            environment = self._kubectl.environment
            with subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            ) as self._process:
                assert self._process.stdout
                for document in _documents(self._process.stdout):
                    self._states.put(document)
            time.sleep(0.5)  # the run is not there yet, or the API server ended the watch


def _documents(lines: Iterator[str]) -> Iterator[Run]:
    """JSON documents of kubectl's indented output, each closed by a brace in the first column."""
    collected: list[str] = []
    for line in lines:
        collected.append(line)
        if line.rstrip("\n") == "}":
            yield json.loads("".join(collected))
            collected = []


def status(run: Run) -> dict[str, Any]:
    """The run's status; empty while there is none."""
    return dict(run.get("status") or {})


def word(run: Run) -> str:
    """Status in one word."""
    return str(status(run).get("state", "Pending"))


def condition(run: Run, kind: str) -> dict[str, Any] | None:
    """The condition of this type, or None."""
    return next((item for item in status(run).get("conditions", []) if item["type"] == kind), None)


def step(run: Run) -> int:
    """Optimizer steps done."""
    return int(status(run).get("progress", {}).get("step", 0))


def active(run: Run) -> int:
    """Members of the current generation."""
    return int(status(run).get("nodes", {}).get("active", 0))


def describe(run: Run) -> str:
    """State, conditions and last failure in one paragraph."""
    found = status(run)
    said = [
        f"{item['type']}={item['status']} ({item['reason']}: {item['message']})" for item in found.get("conditions", [])
    ]
    failure = found.get("lastFailure")
    tail = f"; last failure: {failure['reason']}: {failure['message']} {failure.get('logTail', '')}" if failure else ""
    return f"state {word(run)}; {'; '.join(said) or 'no condition yet'}{tail}"


def line(run: Run) -> str:
    """How it is going: state, bar, step, loss, evaluation loss, speed, nodes, time to go."""
    found, progress = status(run), status(run).get("progress", {})
    done, total = progress.get("step", 0), progress.get("totalSteps", 0)
    bar = "█" * round(20 * done / total) if total else ""
    shown = (("loss", "loss", ".3f"), ("eval", "evalLoss", ".3f"), ("tok/s", "tokensPerSecond", ".0f"))
    numbers = [f"{name} {progress[key]:{form}}" for name, key, form in shown if progress.get(key) is not None]
    nodes = f"nodes {found.get('nodesSummary') or '-'}"
    eta = f"ETA {progress['etaSeconds']} s" if progress.get("etaSeconds") else ""
    parts = (f"{word(run):<9}", f"{bar:░<20} {done:>3}/{total}", *numbers, nodes, eta)
    return "  ".join(part for part in parts if part)


class Display:
    """One line that changes in place on a terminal; elsewhere a line for each change of substance."""

    def __init__(self) -> None:
        self._begin, self._last = time.monotonic(), ("", 0, 0)

    def __call__(self, run: Run) -> None:
        stamp = f"[{time.monotonic() - self._begin:6.1f}s]"
        if sys.stdout.isatty():
            print(f"\r\033[K{stamp} {line(run)}", end="", flush=True)
            return
        key = (word(run), active(run), step(run) // 5)
        if key != self._last:
            self._last = key
            print(stamp, line(run), flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        start = "\r\033[K" if sys.stdout.isatty() else ""
        print(f"{start}[{time.monotonic() - self._begin:6.1f}s] {text}", flush=True)
