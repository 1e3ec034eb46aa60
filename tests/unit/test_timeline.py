"""What a timeline makes of steps that were seen."""

from tests.chaos.timeline import Fall, Timeline


def seen(steps: dict[int, dict[int, float]], members: dict[int, list[str]]) -> Timeline:
    """generation -> step -> when; generation -> uids."""
    timeline = Timeline()
    timeline._seen.update(steps)
    for generation, uids in members.items():
        timeline.members(generation, uids)
    return timeline


def test_a_lost_step_is_excused_only_when_no_pod_was_left() -> None:
    steps = {1: {0: 0.0, 9: 1.0}, 2: {8: 2.0, 12: 3.0}, 3: {10: 4.0, 11: 5.0}, 4: {11: 6.0}, 5: {9: 7.0}}
    timeline = seen(steps, {1: ["a", "b"], 2: ["b"], 3: ["c"], 4: ["c"]})
    assert timeline.falls() == [Fall(1, True), Fall(2, False), Fall(0, True), Fall(2, True)]


def test_time_without_steps_is_stalled() -> None:
    assert seen({}, {}).stalled_seconds(0.0, 60.0, 1.0) == 59.0
    timeline = seen({1: {1: 1.0, 2: 2.0, 3: 4.5}, 2: {3: 8.0, 4: 9.0}}, {})
    assert timeline.stalled_seconds(0.0, 10.0, 1.0) == 3.5


def test_a_newcomers_rehearsal_is_no_generation() -> None:
    timeline = seen({0: {0: 0.0}, 1: {0: 0.5, 1: 1.0, 2: 2.0}}, {0: [], 1: ["a"]})
    assert timeline.falls() == [] and timeline.growths() == []
