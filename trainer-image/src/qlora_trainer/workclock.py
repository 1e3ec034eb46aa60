"""How long this rank works for a step, apart from what it waits for others: the measure by which stragglers are told.

Rules: from the step's start until it is about to enter the all-reduce. On a GPU the kernels run behind the host, so two
CUDA events mark the stream; they are read once the all-reduce's result was, when both have certainly happened: nothing
waits for them. Where FSDP2 gathers the base its collectives wait for the slowest rank inside the micro batches, too:
there all ranks measure alike.
"""

import time
from collections import deque
from statistics import median

import torch

_WINDOW, _LEAST = 20, 10  # steps that the median is taken of; a few at the start compile and fill caches


class WorkClock:
    """`start`, `stop` and, after the collective that follows, `take`, once a step."""

    def __init__(self, device_type: str) -> None:
        self._seconds: deque[float] = deque(maxlen=_WINDOW)
        self._on_gpu = device_type == "cuda"
        self._started = self._stopped = 0.0
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def start(self) -> None:
        """The step begins."""
        if self._on_gpu:
            self._events = self._events or (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self._events[0].record()
        else:
            self._started = time.monotonic()

    def stop(self) -> None:
        """This rank's micro batches are done, or on their way on the stream."""
        if self._events is not None:
            self._events[1].record()
        else:
            self._stopped = time.monotonic()

    def take(self) -> None:
        """The all-reduce's result is on the host: so are the ends of all that came before it."""
        if self._events is not None:
            self._seconds.append(self._events[0].elapsed_time(self._events[1]) / 1000)
        else:
            self._seconds.append(self._stopped - self._started)

    @property
    def median_seconds(self) -> float | None:
        """Of the last steps; None before there were enough."""
        return median(self._seconds) if len(self._seconds) >= _LEAST else None
