"""A stall of the operator must not make its agents silent."""

from qlora_operator.clock import AttentiveClock


def test_it_follows_the_time_but_not_a_stall() -> None:
    readings = iter([100.0, 100.1, 100.2, 104.2, 104.3])
    clock = AttentiveClock(longest_gap=0.5, read=lambda: next(readings))
    ages = [round(clock.now(), 3) for _ in range(4)]
    assert ages == [0.1, 0.2, 0.7, 0.8]
