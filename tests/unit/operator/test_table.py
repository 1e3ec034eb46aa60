"""What the coordinator remembers, with a clock that tests turn."""

from math import inf
from typing import Any

import pytest
from tests.unit.operator.build import ended

from qlora_api.run import AgentState, Command, Membership, Report
from qlora_api.status import Progress
from qlora_operator.state import Agent, PodIdentity
from qlora_operator.table import RunTable, is_newer, stop_answer

POD = PodIdentity("ns", "r-qlora", "r-0-0", "uid-0")


def report(state: AgentState = AgentState.RUNNING, generation: int = 1, **fields: Any) -> Report:
    return Report(address="10.0.0.1", state=state, generation=generation, **fields)


def only_agent(table: RunTable, now: float) -> Agent:
    (agent,) = table.heard(now).agents
    return agent


def test_ages() -> None:
    table = RunTable(known_since=100)
    assert table.receive(POD, report(AgentState.READY, 0), 110)
    assert not table.receive(POD, report(AgentState.READY, 0), 112), "a mere sign of life"
    heard = table.heard(115)
    assert (heard.listening_age, heard.heard_age, heard.agents[0].age, heard.agents[0].state_age) == (15, 5, 3, 5)
    assert table.receive(POD, report(AgentState.RUNNING, 1), 116)
    assert only_agent(table, 117).state_age == 1


def test_a_broken_connection_until_the_next_report() -> None:
    table = RunTable(known_since=0)
    table.receive(POD, report(), 1)
    table.drop(POD, 2)
    assert only_agent(table, 2.5).dropped == 0.5
    assert table.receive(POD, report(), 3), "that it is back is news"
    assert only_agent(table, 4).dropped is None


def test_a_failure_is_remembered_until_a_newer_generation() -> None:
    table = RunTable(known_since=0)
    table.receive(POD, report(AgentState.FAILED, 2, termination=ended(70)), 1)
    table.receive(POD, report(AgentState.READY, 2), 2)
    assert only_agent(table, 2).failure == ended(70) and only_agent(table, 2).failure_generation == 2
    table.receive(POD, report(AgentState.RUNNING, 3), 3)
    assert only_agent(table, 3).failure is None


def test_an_agent_that_began_anew_is_known_by_what_it_once_joined() -> None:
    table = RunTable(known_since=0)
    table.receive(POD, report(generation=5), 1)
    table.receive(POD, report(AgentState.READY, 0), 2)
    assert only_agent(table, 2).highest == 5


def test_prepare_runs_from_its_first_announcement_and_ends_with_the_publication() -> None:
    table = RunTable(known_since=0)
    table.publish(Membership(generation=1, prepare=1), 1)
    assert table.heard(2).prepare_age is None
    assert table.publish(Membership(generation=1, prepare=2), 2)
    assert not table.publish(Membership(generation=1, prepare=2), 3), "no news"
    assert table.heard(4).prepare_age == 2
    table.publish(Membership(generation=2, prepare=2), 5)
    assert table.heard(6).prepare_age is None and table.heard(6).generation_age == 1


def test_a_change_that_an_earlier_process_announced_goes_on() -> None:
    table = RunTable(known_since=0)
    table.publish(Membership(generation=1, prepare=1), 1)
    table.receive(POD, report(known_generation=1, known_prepare=2), 2)
    assert table.heard(3).prepare_age == 1


def test_steps_are_timed() -> None:
    table = RunTable(known_since=0)
    for second, step in ((0, 10), (2, 11), (3, 11), (8, 14), (9, 12)):
        table.receive(POD, report(progress=Progress(step=step)), second)
    heard = table.heard(10)
    assert heard.step_age == 2 and heard.median_step == pytest.approx(2)


def test_what_is_done_between_steps_is_timed() -> None:
    table = RunTable(known_since=0)
    table.receive(POD, report(progress=Progress(step=3)), 1)
    table.receive(POD, report(progress=Progress(step=3)), 2)
    assert table.heard(10).activity_age == inf, "this trainer does not tell"
    for second, activity in ((3, 1), (4, 2), (5, 2)):
        table.receive(POD, report(progress=Progress(step=3), activity=activity), second)
    assert table.heard(10).activity_age == 6
    table.receive(POD, report(progress=None), 6)  # the workers of a new generation have told nothing yet
    assert table.heard(10).activity_age == 6


def test_under_which_generation_the_newest_step_was_done() -> None:
    table = RunTable(known_since=0)
    table.receive(POD, report(generation=4, progress=Progress(step=3)), 1)
    assert table.heard(2).stepped_generation == 0, "it may have been done before"
    table.receive(POD, report(generation=4, progress=Progress(step=4)), 2)
    assert table.heard(2).stepped_generation == 4
    table.receive(POD, report(generation=5, progress=Progress(step=4)), 3)
    assert table.heard(4).stepped_generation == 4


def test_the_dead_are_forgotten_in_time() -> None:
    table = RunTable(known_since=0)
    table.receive(POD, report(), 0)
    table.keep([], 59)
    assert table.heard(59).agents
    table.keep(["uid-0"], 61)
    assert table.heard(61).agents
    table.keep([], 61)
    assert not table.heard(61).agents


@pytest.mark.parametrize(
    ("answer", "newer"),
    [
        (Membership(generation=3, prepare=3), False),
        (Membership(generation=4, prepare=4), True),
        (Membership(generation=3, prepare=4), True),
        (Membership(generation=3, prepare=3, command=Command.STOP), True),
        (stop_answer(), True),
    ],
)
def test_news(answer: Membership, newer: bool) -> None:
    assert is_newer(answer, report(known_generation=3, known_prepare=3)) is newer
