"""Scripted faults: a process reaches a named point at a named step and is stopped there, once.

Off unless QLORA_FAULTS names a file; then the file holds one JSON object a line and may grow while the run goes on:

    {"id": "7", "point": "backward", "step": 12, "ranks": [0], "action": "SIGKILL"}

`step` and `ranks` left out match any, `pod` matches QLORA_POD_NAME. Actions: a signal's name (sent to this process),
`agent:SIGTERM` (sent to the agent), `damage` (change what the pre-flight check reads at this point), or `hold`: stand
still until `FILE.ID.release` exists, so that a driver can kill whomever it wants at exactly this point. A process that
reaches its fault first leaves `FILE.ID.RANK` with the time: a fault happens once, however often the worker restarts.
Only `delay:SECONDS` happens every time, until its line is gone from the file.
"""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

from qlora_api.run import ENV_POD_NAME

ENV_FAULTS = "QLORA_FAULTS"
POINTS = (
    "data",
    "forward",
    "backward",
    "all-reduce",
    "optimizer",
    "snapshot",
    "header-write",
    "upload",
    "manifest",
    "rendezvous",
    "warm-up",
    "preflight-compute",
    "preflight-memory",
    "preflight-links",
)

_plan: list[dict[str, Any]] = []
_plan_stamp: tuple[int, int] | None = None


def damages(point: str) -> bool:
    """Whether what this process reads at `point` is to be damaged now."""
    file, scripted = _scripted(point, None)
    return any(fault.get("action") == "damage" and _claim(file, fault) for fault in scripted)


def reach(point: str, step: int | None = None) -> None:
    """Tell that this process is at `point` of `step`; returns unless a fault is scripted for it."""
    file, scripted = _scripted(point, step)
    for fault in scripted:
        if (action := str(fault.get("action", "hold"))).startswith("delay:"):
            time.sleep(float(action.removeprefix("delay:")))
        elif _claim(file, fault):
            _happen(file, fault)


def _scripted(point: str, step: int | None) -> tuple[Path, list[dict[str, Any]]]:
    """The file of faults, and those that are scripted for this process here."""
    file = os.environ.get(ENV_FAULTS)
    if not file:
        return Path(), []
    assert point in POINTS, f"unknown point {point}: one of {', '.join(POINTS)}"
    return Path(file), [fault for fault in _read_plan(Path(file)) if _matches(fault, point, step)]


def _read_plan(file: Path) -> list[dict[str, Any]]:
    global _plan, _plan_stamp
    try:
        stat = file.stat()
    except FileNotFoundError:
        return []
    if _plan_stamp != (stat.st_mtime_ns, stat.st_size):
        _plan = [json.loads(line) for line in file.read_text().splitlines() if line]
        _plan_stamp = (stat.st_mtime_ns, stat.st_size)
    return _plan


def _matches(fault: dict[str, Any], point: str, step: int | None) -> bool:
    if fault["point"] != point:
        return False
    if fault.get("step") is not None and fault["step"] != step:
        return False
    if fault.get("pod") is not None and fault["pod"] != os.environ.get(ENV_POD_NAME):
        return False
    return fault.get("ranks") is None or int(os.environ.get("RANK", "-1")) in fault["ranks"]


def _claim(file: Path, fault: dict[str, Any]) -> bool:
    owner = fault.get("pod") or os.environ.get("RANK", "x")
    mark = file.with_name(f"{file.name}.{fault['id']}.{owner}")
    try:
        with mark.open("x") as claim:
            claim.write(json.dumps({"time": time.time(), "pid": os.getpid()}))
    except FileExistsError:
        return False
    return True


def _happen(file: Path, fault: dict[str, Any]) -> None:
    action: str = fault.get("action", "hold")
    if action == "hold":
        release = file.with_name(f"{file.name}.{fault['id']}.release")
        while not release.exists():
            time.sleep(0.005)
    elif action.startswith("agent:"):
        agent = multiprocessing.parent_process()
        assert agent is not None and agent.pid is not None, "only a worker has an agent"
        os.kill(agent.pid, signal.Signals[action.removeprefix("agent:")])
    else:
        os.kill(os.getpid(), signal.Signals[action])
