"""The measure by which stragglers are told: a rank's own work, told as the median of its last steps."""

import pytest

from qlora_trainer import workclock
from qlora_trainer.workclock import WorkClock


def run(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> WorkClock:
    """Steps of so long, each followed by a wait for others of a hundred seconds."""
    clock, now = WorkClock("cpu"), [0.0]
    monkeypatch.setattr(workclock.time, "monotonic", lambda: now[0])
    for work in seconds:
        clock.start()
        now[0] += work
        clock.stop()
        now[0] += 100
        clock.take()
    return clock


def test_the_wait_for_others_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, *[0.5] * 10).median_seconds == pytest.approx(0.5)


def test_a_first_step_that_compiles_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, 90.0, 5.0, *[0.5] * 18).median_seconds == pytest.approx(0.5)


def test_a_few_steps_say_nothing_and_old_ones_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, *[0.5] * 9).median_seconds is None
    assert run(monkeypatch, *[0.5] * 30, *[2.0] * 11).median_seconds == pytest.approx(2.0)
