"""When members that run and get nothing done count as hung."""

from dataclasses import replace
from datetime import timedelta
from math import inf
from typing import Any

from tests.unit.operator.build import SETTINGS, agent, observed, pod, running, training

from qlora_api.run import AgentState
from qlora_api.status import Progress, Slot
from qlora_operator.decide import decide
from qlora_operator.state import Observed

P0, P1 = pod(0), pod(1)


def test_hung_workers_are_restarted_and_counted() -> None:
    status = training(P0, P1)
    hung = observed([P0, P1], [running(P0), running(P1)], status, step_age=2000.0, generation_age=2000.0)
    called = decide(hung, SETTINGS)
    assert called.membership.prepare == 2 and called.status.restarts.failures == 0
    standing = [agent(p, AgentState.READY, 1, progress=Progress(step=5, total_steps=100)) for p in (P0, P1)]
    later = {"step_age": 2001.0, "generation_age": 2001.0, "prepare_age": 1.0}
    published = decide(replace(hung, agents=tuple(standing), **later), SETTINGS)
    assert published.status.generation == 2 and published.status.restarts.by_reason == {"Hung": 1}
    assert published.status.last_failure is not None and "nothing was done for" in published.status.last_failure.message
    waited = {**later, "prepare_age": 1000.0}
    calm = decide(replace(hung, agents=tuple(standing), **waited), SETTINGS)
    assert calm.status.generation == 2 and calm.status.restarts.by_reason == {}, (
        "they stood and waited, they did not hang"
    )
    slow = replace(hung, step_age=700.0, median_step=40.0)
    assert decide(slow, SETTINGS).membership.prepare == 1, "twenty median steps are not over"
    assert decide(replace(slow, median_step=1.0), SETTINGS).membership.prepare == 2


def steady(**fields: Any) -> Observed:
    """Two members that tell what they do between steps and have done some of 1 s, the last 200 s ago."""
    telling = [running(p, step=50, activity=7) for p in (P0, P1)]
    clocks = {"step_age": 200.0, "activity_age": 200.0, "generation_age": 2000.0, "median_step": 1.0}
    return observed([P0, P1], telling, training(P0, P1), **{**clocks, "stepped_generation": 1, **fields})


def test_workers_that_tell_what_they_do_are_known_to_hang_in_minutes() -> None:
    assert decide(steady(), SETTINGS).membership.prepare == 2
    assert decide(steady(), SETTINGS).requeue_after <= SETTINGS.resync_seconds
    assert decide(steady(step_age=170.0), SETTINGS).membership.prepare == 1
    assert decide(steady(activity_age=20.0), SETTINGS).membership.prepare == 1, "a long evaluation, a slow upload"
    assert decide(steady(median_step=11.0), SETTINGS).membership.prepare == 1, "twenty median steps are not over"


def test_workers_that_start_are_given_more_time() -> None:
    assert decide(steady(stepped_generation=0), SETTINGS).membership.prepare == 1, "they may still compile"
    assert decide(steady(generation_age=170.0), SETTINGS).membership.prepare == 1
    late = {"step_age": 601.0, "activity_age": 601.0}
    assert decide(steady(stepped_generation=0, **late), SETTINGS).membership.prepare == 2


def test_trainers_that_do_not_tell_are_given_more_time() -> None:
    """A trainer image from before `Report.activity`: an evaluation of minutes looks like a hang."""
    silent = steady(activity_age=inf)
    o = replace(silent, agents=(silent.agents[0], running(P1, step=50)))
    assert decide(o, SETTINGS).membership.prepare == 1


def test_the_end_of_a_run_takes_its_time() -> None:
    o = steady()
    done = [running(p, activity=7, progress=Progress(step=50, total_steps=50)) for p in (P0, P1)]
    assert decide(replace(o, agents=tuple(done)), SETTINGS).membership.prepare == 1


def test_who_was_not_there_did_not_hang() -> None:
    """Pods that waited for a node for hours, and those of a run that had none for hours: suspended, all nodes lost."""
    long_ago = {"step_age": 7200.0, "generation_age": 7200.0, "prepare_age": 1.0}
    first = decide(observed([P0, P1], [agent(p, AgentState.READY) for p in (P0, P1)], **long_ago), SETTINGS)
    assert first.status.generation == 1 and first.status.restarts.by_reason == {}
    new = [pod(0, 1), pod(1, 1)]
    old = [running(P0, age=7200.0), running(P1, age=7200.0)]
    status = training(P0, P1, slots=[Slot(index=p.index, incarnation=p.incarnation) for p in new])
    agents = [*(agent(p, AgentState.READY) for p in new), *old]
    resumed = decide(observed(new, agents, status, median_step=1.0, **long_ago), SETTINGS)
    assert resumed.status.generation == 2 and resumed.status.restarts.by_reason == {}


def test_a_wedged_worker_counts_once() -> None:
    """Its pod is replaced because it does not come when called; the others stood and waited for the new one."""
    spec = {"elasticPolicy": {"minNodes": 2, "maxNodes": 2}}
    stood = agent(P0, AgentState.READY, 1, step=50, activity=7)
    o = steady(step_age=400.0, activity_age=400.0, prepare_age=121.0)
    o = replace(o, run=observed([], [], spec=spec).run, agents=(stood, o.agents[1]))
    late = decide(o, SETTINGS).status
    assert late.restarts.by_reason == {"Hung": 1} and late.slots[1].incarnation == 1
    new = pod(1, 1)
    clocks = {"step_age": 460.0, "activity_age": 460.0, "prepare_age": 181.0, "now": o.now + timedelta(seconds=60)}
    after = replace(o, status=late, pods=(P0, new), agents=(stood, agent(new, AgentState.READY)), **clocks)
    published = decide(after, SETTINGS).status
    assert published.generation == 2 and published.restarts.by_reason == {"Hung": 1}
