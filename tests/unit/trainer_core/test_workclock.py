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


class Stream:
    """A GPU's: what is recorded happens when the host waits, not before."""

    def __init__(self) -> None:
        self.time = 0.0
        self.waiting: list[Event] = []

    def synchronize(self) -> None:
        for event in self.waiting:
            event.has_happened = True
        self.waiting.clear()

    def event(self, enable_timing: bool) -> "Event":
        assert enable_timing
        return Event(self)


class Event:
    """As torch.cuda.Event: recorded in the stream's time, read in ms and only once it has happened."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.time, self.has_happened = stream, 0.0, False

    def record(self) -> None:
        self.time = self.stream.time
        self.stream.waiting.append(self)

    def elapsed_time(self, later: "Event") -> float:
        assert self.has_happened and later.has_happened, "torch raises here, and waiting would hold the step up"
        return (later.time - self.time) * 1000


def test_on_a_gpu_nothing_is_read_before_it_has_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream()
    monkeypatch.setattr(workclock.torch.cuda, "Event", stream.event)
    monkeypatch.setattr(workclock, "GATHERS", workclock.GatherClock())
    clock, told = WorkClock("cuda"), []
    for _ in range(20):
        clock.start()
        for _ in range(3):
            with workclock.GATHERS.waiting():
                stream.time += 0.125
            stream.time += 1.0
        clock.stop()
        stream.time += 2.0  # the all-reduce
        stream.synchronize()  # its result
        clock.take()
        stream.synchronize()  # the gradient's norm
        told.append(dict(clock.waits))
    assert clock.median_seconds == pytest.approx(3.375)
    assert told[0].keys() == {"data_wait_seconds"}, "the gathers of a step that compiles are not timed"
    assert told[1]["gather_wait_seconds"] == pytest.approx(0.375)
    assert told[1]["all_reduce_seconds"] == pytest.approx(2.0), "of the step before"
    assert told[19].keys() == {"data_wait_seconds", "gather_wait_seconds", "all_reduce_seconds"}
