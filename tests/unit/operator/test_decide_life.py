"""The decision over a run's life: success, time to live, deadlines, suspension, scaling."""

from dataclasses import replace

import pytest
from tests.unit.operator.build import (
    NOW,
    SETTINGS,
    agent,
    ago,
    condition,
    ended,
    names_of,
    observed,
    pod,
    running,
    training,
)

from qlora_api.names import ConditionType, Reason
from qlora_api.run import AgentState, Command, ExitCode
from qlora_api.status import Artifacts, Progress, Slot, State
from qlora_operator import conditions
from qlora_operator.decide import decide
from qlora_operator.state import CreatePod, DeletePod, DeleteRun, Observed

P0, P1 = pod(0), pod(1)
ARTIFACTS = Artifacts(adapter_uri="s3://a", manifest_uri="s3://m", adapter_bytes=5, adapter_sha256="00")


def test_artifacts_complete_the_run_for_good() -> None:
    done = agent(P0, AgentState.FINISHED, 1, artifacts=ARTIFACTS, step=100)
    decision = decide(observed([P0, P1], [done, running(P1)], training(P0, P1)), SETTINGS)
    assert decision.status.state == State.SUCCEEDED and decision.status.artifacts == ARTIFACTS
    assert decision.status.progress.step == 100 and decision.status.completion_time == NOW
    later = decide(observed([P0], [], decision.status, {"suspend": True}), SETTINGS)
    assert later.status == decision.status and names_of(later, DeletePod) == ["r-0-0"]


def test_time_to_live_deletes_the_finished_run() -> None:
    over = training(conditions=[condition(ConditionType.COMPLETE, "True", Reason.ADAPTER_UPLOADED)], state="Succeeded")
    spec = {"ttlSecondsAfterFinished": 60}
    early = decide(observed([], [], over.model_copy(update={"completion_time": ago(50)}), spec), SETTINGS)
    assert early.actions == () and early.requeue_after == pytest.approx(10)
    late = decide(observed([], [], over.model_copy(update={"completion_time": ago(61)}), spec), SETTINGS)
    assert late.actions == (DeleteRun("run-uid"),)


def test_deadlines() -> None:
    active = decide(observed([P0], [running(P0)], training(P0), {"activeDeadlineSeconds": 80}), SETTINGS)
    assert conditions.find(active.status, ConditionType.FAILED).reason == Reason.ACTIVE_DEADLINE_EXCEEDED
    waiting = training(conditions=[], generation=0, members=[])
    start = decide(observed([P0], [], waiting, {"startDeadlineSeconds": 80}), SETTINGS)
    assert conditions.find(start.status, ConditionType.FAILED).reason == Reason.START_DEADLINE_EXCEEDED
    started = decide(observed([P0], [running(P0)], training(P0), {"startDeadlineSeconds": 80}), SETTINGS)
    assert started.status.state == State.RUNNING


def suspending(o: Observed) -> Observed:
    return replace(o, run=replace(o.run, spec=o.run.spec.model_copy(update={"suspend": True})))


def test_suspend_waits_for_the_last_checkpoint_then_gives_the_pods_back() -> None:
    o = suspending(observed([P0, P1], [running(P0), running(P1)], training(P0, P1)))
    asked = decide(o, SETTINGS)
    assert asked.membership.command == Command.STOP and asked.actions == ()
    assert conditions.find(asked.status, ConditionType.SUSPENDED).reason == Reason.SUSPENDING
    stopped = [running(p, termination=ended(ExitCode.STOPPED)) for p in (P0, P1)]
    done = decide(replace(o, status=asked.status, agents=tuple(stopped)), SETTINGS)
    assert done.status.state == State.SUSPENDED and names_of(done, DeletePod) == ["r-0-0", "r-1-0"]
    assert done.status.restarts.disruptions == 0
    repeated = decide(replace(o, status=done.status), SETTINGS)
    assert repeated.status == done.status and names_of(repeated, DeletePod) == ["r-0-0", "r-1-0"]


def test_speed_and_time_to_go_are_those_of_a_run_that_runs() -> None:
    progress = Progress(step=7, total_steps=100, loss=1.5, tokens_per_second=90.0, eta_seconds=600)
    fast = [replace(a, report=a.report.model_copy(update={"progress": progress})) for a in (running(P0), running(P1))]
    o = observed([P0, P1], fast, training(P0, P1))
    runs = decide(o, SETTINGS).status
    assert runs.progress == progress
    stopped = tuple(replace(a, failure=ended(ExitCode.STOPPED)) for a in fast)
    suspended = decide(replace(suspending(o), status=runs, agents=stopped), SETTINGS).status
    waiting = decide(replace(o, status=suspended, pods=(), agents=()), SETTINGS).status
    assert (suspended.state, waiting.state) == (State.SUSPENDED, State.PENDING)
    for status in (suspended, waiting):
        assert status.progress == Progress(step=7, total_steps=100, loss=1.5)


def test_suspend_does_not_wait_for_ever() -> None:
    since = condition(ConditionType.SUSPENDED, "Unknown", Reason.SUSPENDING, since=121)
    o = suspending(observed([P0], [running(P0)], training(P0, conditions=[since])))
    assert names_of(decide(o, SETTINGS), DeletePod) == ["r-0-0"]


def test_resuming_starts_new_pods_and_counts_deadlines_anew() -> None:
    paused = training(P0, conditions=[condition(ConditionType.SUSPENDED, "True", Reason.SUSPENDED)])
    paused = paused.model_copy(update={"slots": [Slot(index=0, incarnation=1)]})
    decision = decide(observed([], [], paused, {"activeDeadlineSeconds": 60}), SETTINGS)
    assert names_of(decision, CreatePod) == ["r-0-1", "r-1-0"]
    assert conditions.find(decision.status, ConditionType.SUSPENDED).reason == Reason.RESUMED
    assert decision.status.state == State.PENDING and decision.status.restarts.disruptions == 0


def test_scaling_down_releases_the_highest_place_and_calls_the_others() -> None:
    one = {"elasticPolicy": {"minNodes": 1, "maxNodes": 1}}
    decision = decide(observed([P0, P1], [running(P0), running(P1)], training(P0, P1), one), SETTINGS)
    assert names_of(decision, DeletePod) == ["r-1-0"] and decision.membership.prepare == 2
    assert decision.status.slots[1].incarnation == 1 and decision.status.restarts.disruptions == 0
    assert decision.status.nodes_summary == "1/1"


def test_scaling_up_adds_a_place() -> None:
    three = {"elasticPolicy": {"minNodes": 1, "maxNodes": 3}}
    decision = decide(observed([P0, P1], [running(P0), running(P1)], training(P0, P1), three), SETTINGS)
    assert names_of(decision, CreatePod) == ["r-2-0"] and decision.membership.prepare == 1
