"""How much of the CPUs the host took away."""

from tests.chaos.cputimes import CpuTimes


def test_the_share_that_was_stolen_since() -> None:
    before = CpuTimes.parse("cpu  100 0 50 800 10 0 0 40 7 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    after = CpuTimes.parse("cpu  140 0 60 820 10 0 0 70 9 0\n")
    assert before == CpuTimes(stolen=40, total=1000)
    assert after.stolen_percent(before) == 30.0
    assert before.stolen_percent(before) == 0.0


def test_this_machine_tells() -> None:
    assert 0 <= CpuTimes.now().stolen <= CpuTimes.now().total
