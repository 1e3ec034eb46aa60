"""Time: a clock that stands still while this process does, and a wait that ends.

Agents are judged by how long they have been silent. If the operator itself got no processor for some seconds, their
reports lie unread in its sockets, and by the plain clock everybody would be lost at once. So a gap between two readings
counts for at most `longest_gap` seconds; a ticker reads often enough that only a stall makes such a gap.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable

TICK_SECONDS = 0.1
LONGEST_GAP_SECONDS = 0.5


class AttentiveClock:
    """Seconds in which this process could listen. Monotonic; starts at 0."""

    def __init__(self, longest_gap: float = LONGEST_GAP_SECONDS, read: Callable[[], float] = time.monotonic) -> None:
        self._longest_gap, self._read = longest_gap, read
        self._last, self._elapsed = read(), 0.0

    def now(self) -> float:
        """Attentive seconds so far."""
        reading = self._read()
        self._elapsed += min(reading - self._last, self._longest_gap)
        self._last = reading
        return self._elapsed

    async def tick(self) -> None:
        """For ever: read often, so that a long gap means a stall."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.now()


async def wait_at_most(event: asyncio.Event, seconds: float) -> None:
    """Until the event is set or the time is over."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
