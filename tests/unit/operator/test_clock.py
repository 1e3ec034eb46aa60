"""A stall of the operator must not make its agents silent; a wait ends."""

import asyncio

from qlora_operator.clock import AttentiveClock, wait_at_most


def test_it_follows_the_time_but_not_a_stall() -> None:
    readings = iter([100.0, 100.1, 100.2, 104.2, 104.3])
    clock = AttentiveClock(longest_gap=0.5, read=lambda: next(readings))
    ages = [round(clock.now(), 3) for _ in range(4)]
    assert ages == [0.1, 0.2, 0.7, 0.8]


async def test_a_wait_ends_with_the_event_or_with_the_time() -> None:
    event = asyncio.Event()
    await wait_at_most(event, 0.01)
    assert not event.is_set()
    waiter = asyncio.create_task(wait_at_most(event, 3600))
    await asyncio.sleep(0)
    event.set()
    async with asyncio.timeout(5):
        await waiter
