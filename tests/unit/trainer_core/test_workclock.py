"""A rank's own work, by which stragglers are told as the median of its last steps, and what a step waits for."""

import pytest

from qlora_trainer import workclock
from qlora_trainer.workclock import GATHERS, WorkClock


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


def test_what_a_step_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, now = WorkClock("cpu"), [0.0]
    monkeypatch.setattr(workclock.time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> float:
        now[0] += seconds
        return seconds

    assert clock.waits == {}
    for _ in range(2):
        clock.start()
        for _ in range(3):
            with clock.loading():
                wait(0.25)
            assert GATHERS.timed(wait)(0.5) == 0.5
            wait(1.0)  # the kernels
        clock.stop()
        wait(4.0)
        clock.take()
        GATHERS.timed(wait)(9.0)  # an evaluation's
    assert clock.waits == {"data_wait_seconds": 0.75, "gather_wait_seconds": 1.5, "all_reduce_seconds": 4.0}


def test_a_base_that_is_whole_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "gather_wait_seconds" not in run(monkeypatch, 1.0, 1.0).waits


def test_a_generation_before_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    test_what_a_step_waits_for(monkeypatch)
    assert WorkClock("cpu").waits == {}
