"""Who holds up the others: told once when it begins and once when it ends, never acted on."""

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.operator.build import NOW, SETTINGS, ago, observed, pod, running, training

from qlora_api.names import Reason
from qlora_api.run import METRIC_STEP_WORK
from qlora_api.status import QLoRAFinetuneStatus, Straggler
from qlora_operator.decide import decide
from qlora_operator.state import Decision
from qlora_operator.stragglers import RATIO, RECOVERED_RATIO, Part, find

TIMES = st.lists(st.one_of(st.none(), st.floats(0.001, 100)), max_size=6)


def parts(*seconds: float | None) -> tuple[Part, ...]:
    return tuple(Part(f"r-{rank}-0", f"node-{rank}", value) for rank, value in enumerate(seconds))


def slow(*seconds: float | None, known: tuple[Straggler, ...] = ()) -> dict[str, float]:
    return {straggler.pod_name: straggler.ratio for straggler in find(known, parts(*seconds), NOW)}


def straggler(ratio: float, rank: int = 1) -> Straggler:
    return Straggler(pod_name=f"r-{rank}-0", node_name=f"node-{rank}", ratio=ratio, work_seconds=ratio, since=ago(100))


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ((1.0, 1.0, 1.0), {}),
        ((1.0, 1.4), {}),
        ((1.0, 2.0), {"r-1-0": 2.0}),
        ((3.0, 1.0, 1.2), {"r-0-0": 3.0 / 1.1}),
        ((1.0, 1.0, 1.0, 4.0, 5.0), {"r-3-0": 4.0, "r-4-0": 5.0}),
        ((9.0,), {}),
        ((9.0, None), {}),
        ((0.02, 0.06), {}),
    ],
    ids=str,
)
def test_who_is_slow(seconds: tuple[float | None, ...], expected: dict[str, float]) -> None:
    assert slow(*seconds) == pytest.approx(expected, rel=1e-4)


def test_one_at_the_edge_is_told_once() -> None:
    was = (straggler(1.6),)
    assert slow(1.0, 1.4) == {} and slow(1.0, 1.4, known=was) == {"r-1-0": 1.6}
    assert slow(1.0, 1.2, known=was) == {}
    assert slow(0.06, 0.1) == {} and slow(0.06, 0.1, known=was) == {"r-1-0": 1.6}
    assert slow(0.06, 0.08, known=was) == {}
    assert slow(1.0, 3.0, known=was) == {"r-1-0": 3.0}, "much worse than it was"
    (worse,) = find(was, parts(1.0, 3.0), NOW)
    assert worse.since == ago(100)


def test_workers_that_have_just_started_change_nothing() -> None:
    was = (straggler(2.0),)
    assert find(was, parts(None, None), NOW) == list(was)
    assert find(was, parts(1.0, None), NOW) == list(was)
    assert find(was, parts(1.0)[:1], NOW) == [], "it left the generation"


@given(TIMES, st.floats(0.1, 10))
def test_laws(seconds: list[float | None], scale: float) -> None:
    members = parts(*seconds)
    found = find((), members, NOW)
    assert find((), members, NOW) == found and find(found, members, NOW + timedelta(seconds=1)) == found, "settles"
    assert find((), tuple(reversed(members)), NOW)[::-1] == found, "the order of ranks does not matter"
    measured = [value for value in seconds if value is not None]
    assert all(s.ratio >= RATIO * 0.999 for s in found) and RECOVERED_RATIO < RATIO
    if measured and len(measured) > 1:
        assert f"r-{seconds.index(min(measured))}-0" not in {s.pod_name for s in found}, "the fastest is none"
    even = tuple(replace(part, seconds=scale) for part in members)
    assert find((), even, NOW) == []


P0, P1 = pod(0), pod(1)


def passing(status: QLoRAFinetuneStatus, *seconds: float) -> Decision:
    agents = [running(p, metrics={METRIC_STEP_WORK: value}) for p, value in zip((P0, P1), seconds, strict=True)]
    return decide(observed([P0, P1], agents, status), SETTINGS)


def told(decision: Decision) -> list[tuple[str, str]]:
    return [(event.reason, event.kind) for event in decision.events]


def test_status_and_events_through_a_slow_time() -> None:
    calm = passing(passing(training(P0, P1), 0.3, 0.3).status, 0.3, 0.31)
    assert calm.status.stragglers == [] and told(calm) == []
    began = passing(calm.status, 0.3, 0.9)
    assert told(began) == [(Reason.STRAGGLER, "Warning")]
    assert "r-1-0 on node node-1 works 3.0 times as long" in began.events[0].message
    assert "nvidia-smi" in began.events[0].message and "delete the pod" in began.events[0].message
    assert began.actions == () and began.membership.prepare == began.membership.generation == 1, "it is only told"
    goes_on = passing(began.status, 0.3, 0.85)
    assert goes_on.status == began.status and told(goes_on) == []
    over = passing(goes_on.status, 0.3, 0.32)
    assert over.status.stragglers == [] and told(over) == [(Reason.STRAGGLER_RECOVERED, "Normal")]


def test_a_straggler_that_is_lost_did_not_recover() -> None:
    began = passing(training(P0, P1), 0.3, 0.9)
    lost = decide(observed([P0], [running(P0)], began.status), SETTINGS)
    alone = lost.status.model_copy(update={"members": lost.status.members[:1], "generation": 2})
    after = decide(observed([P0], [running(P0, 2)], alone), SETTINGS)
    assert after.status.stragglers == []
    assert Reason.STRAGGLER_RECOVERED not in [event.reason for event in (*lost.events, *after.events)]


def test_the_only_one_left_holds_up_nobody_and_did_not_recover() -> None:
    began = passing(training(P0, P1), 0.3, 0.9)
    alone = began.status.model_copy(update={"members": began.status.members[1:], "generation": 2})
    after = decide(observed([P0, P1], [running(P1, 2)], alone), SETTINGS)
    assert after.status.stragglers == []
    assert Reason.STRAGGLER_RECOVERED not in [event.reason for event in after.events]


def test_a_run_that_is_suspended_has_none() -> None:
    began = passing(training(P0, P1), 0.3, 0.9)
    suspended = decide(observed([], [], began.status, spec={"suspend": True}), SETTINGS)
    assert suspended.status.stragglers == []
    assert Reason.STRAGGLER_RECOVERED not in [event.reason for event in suspended.events]
