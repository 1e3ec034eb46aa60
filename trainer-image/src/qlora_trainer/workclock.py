"""How long this rank works for a step, and what it waits for: data, the base's other shards, the other ranks.

Rules: its own work goes from the step's start until it is about to enter the all-reduce. On a GPU the kernels run
behind the host, so CUDA events mark the stream; they are read once the all-reduce's result was (what is recorded later:
a step later), when all have certainly happened: nothing waits for them. Where FSDP2 gathers the base its collectives
wait for the slowest rank inside the micro batches, too: there all ranks measure alike.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import ParamSpec, TypeVar

import torch

_WINDOW, _LEAST = 20, 10  # steps that the median is taken of; a few at the start compile and fill caches
_GATHER_STEPS = 16  # on a GPU gathers are timed in one step of so many: two events a layer and pass
P = ParamSpec("P")
T = TypeVar("T")


class _Mark:
    """A moment on the stream or, on a CPU, of the host."""

    def __init__(self, on_gpu: bool) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if on_gpu else None
        self._time = time.monotonic()
        if self._event is not None:
            self._event.record()

    def until(self, later: "_Mark") -> float:
        """Seconds; on a GPU both have happened."""
        if self._event is not None and later._event is not None:
            return float(self._event.elapsed_time(later._event)) / 1000
        return later._time - self._time


class GatherClock:
    """What a step waits for gathered layers: the stream of its kernels or, on a CPU, its thread. One a process."""

    def __init__(self) -> None:
        self.seconds: float | None = None  # of the newest step that was timed; None: it gathered nothing
        self._waits: list[tuple[_Mark, _Mark]] = []
        self._on_gpu = self._times = False
        self._steps = 0

    def start(self, on_gpu: bool) -> None:
        """A step begins."""
        self._on_gpu, self._times = on_gpu, not on_gpu or self._steps % _GATHER_STEPS == 1  # not the one that compiles
        self._steps += 1
        self._waits.clear()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits."""
        begin = _Mark(self._on_gpu) if self._times else None
        yield
        if begin is not None:
            self._waits.append((begin, _Mark(self._on_gpu)))

    def timed(self, wait: Callable[P, T]) -> Callable[P, T]:
        """The same function, `waiting`."""

        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            with self.waiting():
                return wait(*args, **kwargs)

        return call

    def take(self) -> None:
        """All of the step's waits have happened; what gathers until the next step does not count."""
        if self._times:
            self.seconds = sum(begin.until(end) for begin, end in self._waits) if self._waits else None
        self._times = False


GATHERS = GatherClock()


class WorkClock:
    """`start`, `stop` and, after the collective that follows, `take`, once a step."""

    def __init__(self, device_type: str) -> None:
        self._seconds: deque[float] = deque(maxlen=_WINDOW)
        self._on_gpu = device_type == "cuda"
        self._started = self._stopped = self._taken = _Mark(False)
        self._reduced: _Mark | None = None  # the one before `_taken`'s all-reduce, while it is not read
        self._data = 0.0
        self._waits: dict[str, float] = {}
        GATHERS.seconds = None

    def start(self) -> None:
        """The step begins."""
        self._read_all_reduce()
        self._data = 0.0
        GATHERS.start(self._on_gpu)
        self._started = _Mark(self._on_gpu)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Around what makes a micro batch on the host. A GPU waits at most so long: it may be at the one before."""
        started = time.monotonic()
        yield
        self._data += time.monotonic() - started

    def stop(self) -> None:
        """This rank's micro batches are done, or on their way on the stream."""
        self._stopped = _Mark(self._on_gpu)

    def take(self) -> None:
        """The all-reduce's result is on the host: so are the ends of all that came before it."""
        self._seconds.append(self._started.until(self._stopped))
        self._reduced, self._taken = self._stopped, _Mark(self._on_gpu)
        if not self._on_gpu:
            self._read_all_reduce()
        self._waits["data_wait_seconds"] = self._data
        GATHERS.take()

    @property
    def median_seconds(self) -> float | None:
        """Of the last steps; None before there were enough."""
        return median(self._seconds) if len(self._seconds) >= _LEAST else None

    @property
    def waits(self) -> dict[str, float]:
        """Seconds that the newest step waited, by the names of docs/metrics.md."""
        gathers = {} if GATHERS.seconds is None else {"gather_wait_seconds": GATHERS.seconds}
        return {**self._waits, **gathers}

    def _read_all_reduce(self) -> None:
        """From this rank's own work being done until everybody's sum was on the host."""
        if self._reduced is not None:
            self._waits["all_reduce_seconds"] = self._reduced.until(self._taken)
            self._reduced = None


class Laps:
    """What took how long, for people: `str()` gives "joined 0.52 s, set up 0.61 s"."""

    def __init__(self) -> None:
        self._at, self._parts = time.monotonic(), ""

    def note(self, what: str) -> None:
        """This is done since the last note."""
        now = time.monotonic()
        self._parts += f"{', ' if self._parts else ''}{what} {now - self._at:.2f} s"
        self._at = now

    def __str__(self) -> str:
        return self._parts
