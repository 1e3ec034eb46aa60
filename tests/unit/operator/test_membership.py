"""The membership protocol: each rule by itself, and hypothesis looking for a history that breaks a law."""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qlora_api.run import AgentState
from qlora_api.status import Member
from qlora_operator.membership import Candidate, Phase, Plan, View, plan

READY, RUNNING, FAILED = AgentState.READY, AgentState.RUNNING, AgentState.FAILED


def member(index: int) -> Member:
    return Member(pod_uid=f"uid-{index}", pod_name=f"r-{index}-0", address="10.0.0.1")


def candidate(index: int, state: AgentState = READY, joined: int = 0, known: int | None = None) -> Candidate:
    return Candidate(member(index), index, state, joined, joined if known is None else known)


def view(generation: int, members: list[int], *candidates: Candidate, **more: object) -> View:
    base = View(generation, tuple(member(i) for i in members), candidates, 1, 3, 3)
    return replace(base, **more)  # type: ignore[arg-type]


def uids(a_plan: Plan) -> list[str]:
    return [m.pod_uid for m in a_plan.members]


def test_a_start_waits_for_the_expected_nodes_then_goes_with_min_nodes() -> None:
    early = view(0, [], candidate(0), candidate(1), prepare_age=1.0, longest_standing=1.0)
    assert plan(early).phase == Phase.PREPARING and plan(early).recheck == pytest.approx(9.0)
    late = replace(early, longest_standing=10.0)
    assert plan(late).phase == Phase.PUBLISHED and uids(plan(late)) == ["uid-0", "uid-1"]


def test_a_start_does_not_wait_for_nodes_that_cannot_come() -> None:
    assert plan(view(0, [], candidate(0), prepare_age=1.0, expected=1)).phase == Phase.PUBLISHED


def test_below_min_nodes_nothing_is_published() -> None:
    alone = plan(view(0, [], candidate(0), prepare_age=60.0, longest_standing=60.0, min_nodes=2))
    assert alone.phase == Phase.PREPARING and alone.too_few


def test_members_that_run_are_left_alone() -> None:
    steady = plan(view(4, [0, 1], candidate(0, RUNNING, 4), candidate(1, RUNNING, 4)))
    assert (steady.phase, steady.generation, steady.prepare) == (Phase.STEADY, 4, 4)


def test_a_lost_member_calls_the_others_at_once_and_is_left_out() -> None:
    called = plan(view(4, [0, 1, 2], candidate(0, RUNNING, 4), candidate(2, RUNNING, 4)))
    assert (called.phase, called.prepare, called.generation) == (Phase.PREPARING, 5, 4)
    assert set(called.late) == {"uid-0", "uid-2"}
    stand = view(4, [2, 1, 0], candidate(0, READY, 4), candidate(2, READY, 4), prepare_age=1.0)
    assert uids(plan(stand)) == ["uid-2", "uid-0"], "survivors keep their order"


def test_one_who_may_be_dead_already_is_waited_for_until_its_lease_runs_out() -> None:
    waiting = plan(view(4, [0, 1], candidate(0, READY, 4), candidate(1, RUNNING, 4), prepare_age=1.0))
    assert waiting.phase == Phase.PREPARING and waiting.late == ("uid-1",)


def test_one_who_stands_but_has_not_just_reported_is_not_published() -> None:
    stale = replace(candidate(1, READY, 4), fresh=False)
    waiting = plan(view(4, [0, 1], candidate(0, READY, 4), stale, prepare_age=1.0))
    assert waiting.phase == Phase.PREPARING and waiting.recheck is not None


def test_a_newcomer_waits_until_the_members_run_and_goes_last() -> None:
    starting = plan(view(4, [1], candidate(1, READY, 3), candidate(0)))
    assert starting.phase == Phase.STEADY
    running = plan(view(4, [1], candidate(1, RUNNING, 4), candidate(0)))
    assert (running.phase, running.prepare) == (Phase.PREPARING, 5)
    standing = plan(view(4, [1], candidate(1, READY, 4), candidate(0), prepare_age=1.0))
    assert uids(standing) == ["uid-1", "uid-0"]


def test_a_newcomer_disturbs_neither_a_start_nor_the_end() -> None:
    busy = replace(candidate(1, RUNNING, 4), trains=False)  # restores, or publishes
    assert plan(view(4, [1], busy, candidate(0))).phase == Phase.STEADY
    assert plan(view(4, [1, 2], busy, candidate(0))).phase == Phase.PREPARING, "a lost member is another matter"


def test_a_late_report_of_the_old_generation_does_not_undo_the_new_one() -> None:
    assert plan(view(5, [0, 1], candidate(0, READY, 4), candidate(1, RUNNING, 5))).phase == Phase.STEADY


def test_a_member_that_left_this_generation_starts_a_change() -> None:
    assert plan(view(5, [0, 1], candidate(0, READY, 5), candidate(1, RUNNING, 5))).prepare == 6
    assert plan(view(5, [0, 1], candidate(0, FAILED, 5), candidate(1, RUNNING, 5))).prepare == 6


def test_a_status_older_than_what_agents_know_publishes_nothing() -> None:
    assert plan(view(4, [0], candidate(0, READY, 4, known=5), prepare_age=9.0)).phase == Phase.STALE


def test_a_change_once_announced_is_carried_through() -> None:
    again = plan(view(4, [0, 1], candidate(0, READY, 4), candidate(1, READY, 4), prepare_age=1.0))
    assert again.phase == Phase.PUBLISHED and again.generation == 5


def test_publishing_settles_first() -> None:
    soon = plan(view(4, [0, 1], candidate(0, READY, 4), prepare_age=0.1))
    assert soon.phase == Phase.PREPARING and soon.recheck == pytest.approx(0.2)


def test_a_restarted_member_comes_back_as_a_newcomer() -> None:
    again = plan(view(4, [0, 1], candidate(0, READY, 0), candidate(1, READY, 4), prepare_age=1.0))
    assert uids(again) == ["uid-1", "uid-0"]


def test_an_agent_that_began_anew_or_does_not_come_in_starts_a_change() -> None:
    anew = replace(candidate(0, READY, 0), highest=5)
    assert plan(view(5, [0, 1], anew, candidate(1, RUNNING, 5))).prepare == 6
    lost_way = replace(candidate(0, READY, 4), stalled=True)
    assert plan(view(5, [0, 1], lost_way, candidate(1, RUNNING, 5))).prepare == 6


class Protocol(RuleBasedStateMachine):
    """Agents that crash, stall, come back and report late, against `plan` with an operator that forgets."""

    def __init__(self) -> None:
        super().__init__()
        self.generation, self.members, self.prepare_age = 0, (), None
        self.agents: dict[int, Candidate] = {}  # the truth
        self.reported: dict[int, Candidate] = {}  # what the operator heard last
        self.lists: dict[int, tuple[Member, ...]] = {}
        self.told: dict[int, tuple[int, int]] = {}

    @rule(index=st.integers(0, 3))
    def warm_up(self, index: int) -> None:
        self.agents.setdefault(index, candidate(index))

    @rule(index=st.integers(0, 3))
    def crash(self, index: int) -> None:
        self.agents.pop(index, None)
        self.reported.pop(index, None)
        self.told.pop(index, None)

    @rule(index=st.integers(0, 3))
    def worker_dies(self, index: int) -> None:
        agent = self.agents.get(index)
        if agent is not None and agent.state == RUNNING:
            self.agents[index] = replace(agent, state=READY)

    @rule(index=st.integers(0, 3))
    def report(self, index: int) -> None:
        if index in self.agents:
            self.reported[index] = self.agents[index]

    @rule(index=st.integers(0, 3))
    def learn(self, index: int) -> None:
        agent = self.agents.get(index)
        if agent is None:
            return
        prepare = self.generation + (self.prepare_age is not None)
        mine = agent.member in self.members
        agent = replace(agent, known=max(agent.known, self.generation))
        if agent.state == READY and mine and self.generation > agent.joined:
            agent = replace(agent, state=RUNNING, joined=self.generation)
        elif agent.state == RUNNING and (prepare > agent.joined or not mine):
            agent = replace(agent, state=READY)
        self.agents[index] = agent

    @rule()
    def operator_restarts(self) -> None:
        self.prepare_age = None

    @precondition(lambda self: self.reported)
    @rule(settled=st.booleans())
    def operate(self, settled: bool) -> None:
        the_plan = self._plan(settled)
        if the_plan.phase == Phase.PUBLISHED:
            assert the_plan.generation == self.generation + 1
            assert the_plan.generation not in self.lists
            heard = {c.member.pod_uid: c for c in self.reported.values()}
            assert all(heard[m.pod_uid].state == READY for m in the_plan.members)
            assert 2 <= len(the_plan.members) <= 3
            self.lists[the_plan.generation] = the_plan.members
            self.generation, self.members, self.prepare_age = the_plan.generation, the_plan.members, None
        elif the_plan.prepare > self.generation:
            self.prepare_age = self.prepare_age or 0.0

    def _plan(self, settled: bool) -> Plan:
        age = None if self.prepare_age is None else (60.0 if settled else 0.0)
        heard = tuple(self.reported[index] for index in sorted(self.reported))
        return plan(View(self.generation, self.members, heard, 2, 3, 3, age, 60.0 if settled else 0.0))

    @invariant()
    def a_generation_has_one_list(self) -> None:
        assert self.lists.get(self.generation, ()) == tuple(self.members)

    @invariant()
    def nobody_runs_what_was_never_published(self) -> None:
        for agent in self.agents.values():
            if agent.state == RUNNING:
                assert agent.member in self.lists[agent.joined]

    def teardown(self) -> None:
        """Once nothing more happens, enough agents come to train together."""
        for _ in range(12):
            for index in list(self.agents):
                self.report(index)
            if self.reported:
                self.operate(True)
            for index in list(self.agents):
                self.learn(index)
        running = [a for a in self.agents.values() if a.state == RUNNING and a.joined == self.generation]
        if len(self.agents) >= 2:
            assert len(running) == min(len(self.agents), 3) == len(self.members)


Protocol.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestProtocol = Protocol.TestCase
