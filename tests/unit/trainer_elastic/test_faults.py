"""Scripted faults happen once, where they were asked for, and never unasked."""

import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_trainer import faults


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(faults.ENV_FAULTS, str(tmp_path / "plan"))
    monkeypatch.setenv("RANK", "1")
    return tmp_path / "plan"


def script(plan: Path, **fault: object) -> None:
    with plan.open("a") as file:
        file.write(json.dumps({"id": "f", "point": "forward", "action": "SIGUSR2", **fault}) + "\n")


def hits(monkeypatch: pytest.MonkeyPatch, *reached: tuple[str, int | None]) -> int:
    count = []
    monkeypatch.setattr(os, "kill", lambda pid, number: count.append((pid, number)))
    for point, step in reached:
        faults.reach(point, step)
    assert set(count) <= {(os.getpid(), signal.SIGUSR2)}
    return len(count)


def test_off_unless_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(faults.ENV_FAULTS, raising=False)
    assert hits(monkeypatch, ("forward", 1)) == 0


def test_once_at_its_step(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(plan, step=3)
    assert hits(monkeypatch, ("forward", 2), ("backward", 3), ("forward", 3), ("forward", 3)) == 1


def test_only_these_ranks(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(plan, ranks=[0, 2])
    assert hits(monkeypatch, ("forward", 1)) == 0
    script(plan, id="g", ranks=[1])
    assert hits(monkeypatch, ("forward", 2)) == 1, "the plan may grow"


def test_only_this_pod(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_POD_NAME", "a")
    script(plan, pod="b")
    assert hits(monkeypatch, ("forward", 1)) == 0


def test_hold_until_released(plan: Path) -> None:
    script(plan, action="hold")
    held = threading.Thread(target=faults.reach, args=("forward", 1), daemon=True)
    held.start()
    while not list(plan.parent.glob("plan.f.1")):
        time.sleep(0.01)
    assert held.is_alive()
    (plan.parent / "plan.f.release").touch()
    held.join(10)
    assert not held.is_alive()


def test_a_delay_happens_every_time_until_its_line_is_gone(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    script(plan, action="delay:0.25")
    faults.reach("forward", 1)
    faults.reach("forward", 2)
    plan.write_text("")
    faults.reach("forward", 3)
    assert slept == [0.25, 0.25] and not list(plan.parent.glob("plan.f.*"))


def test_a_worker_may_strike_its_agent(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(plan, action="agent:SIGTERM")
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: SimpleNamespace(pid=4711))
    struck = []
    monkeypatch.setattr(os, "kill", lambda pid, number: struck.append((pid, number)))
    faults.reach("forward", 1)
    assert struck == [(4711, signal.SIGTERM)]


def test_an_unknown_point_is_a_mistake_of_ours(plan: Path) -> None:
    with pytest.raises(AssertionError):
        faults.reach("nowhere")
