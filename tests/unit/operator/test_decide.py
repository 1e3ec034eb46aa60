"""The decision, rule by rule: places, members, failures, troubles. A run's life is in test_decide_life.py."""

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
    run,
    running,
    training,
)

from qlora_api.memory import plan
from qlora_api.names import ConditionType, Reason
from qlora_api.run import AgentState, Command, ExitCode
from qlora_api.status import CheckpointStatus, Progress, Slot, State
from qlora_operator import conditions
from qlora_operator.decide import decide
from qlora_operator.state import CreatePod, DeletePod, Exit, Refusal, Trouble

P0, P1 = pod(0), pod(1)


def test_a_new_run_gets_its_places_and_pods_after_what_they_mount() -> None:
    decision = decide(observed([], []), SETTINGS, "CA")
    assert [(slot.index, slot.incarnation) for slot in decision.status.slots] == [(0, 0), (1, 0)]
    assert names_of(decision, CreatePod) == ["r-0-0", "r-1-0"]
    kinds = [a.body["kind"] for a in decision.actions]
    assert kinds == ["ConfigMap", "ServiceAccount", "Pod", "Pod"]
    assert decision.actions[0].body["data"]["ca.crt"] == "CA"
    assert decision.status.state == State.PENDING and decision.status.start_time == NOW


def test_a_steady_run_does_nothing() -> None:
    first = decide(observed([P0, P1], [running(P0), running(P1)], training(P0, P1)), SETTINGS)
    again = decide(observed([P0, P1], [running(P0), running(P1)], first.status), SETTINGS)
    assert again.status == first.status and again.actions == () and again.events == ()
    assert again.membership.prepare == again.membership.generation == 1


def test_ready_agents_become_the_first_generation_in_one_write() -> None:
    ready = [agent(p, AgentState.READY, state_age=1.0) for p in (P0, P1)]
    start = training(generation=0, members=[], slots=[Slot(index=0), Slot(index=1)], conditions=[])
    called = decide(observed([P0, P1], ready, start), SETTINGS)
    assert (called.membership.generation, called.membership.prepare) == (0, 1)
    decision = decide(observed([P0, P1], ready, start, prepare_age=0.5), SETTINGS)
    assert [m.pod_name for m in decision.status.members] == ["r-0-0", "r-1-0"]
    assert decision.membership.generation == decision.status.generation == 1
    assert any(event.reason == Reason.MEMBERS_CHANGED for event in decision.events)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"deleting": True, "reason": "EvictionByEvictionAPI"}, Reason.EVICTED),
        ({"deleting": True, "reason": "DeletionByTaintManager"}, Reason.NODE_LOST),
        ({"deleting": True}, Reason.POD_LOST),
        ({"phase": "Failed", "reason": "Evicted"}, Reason.EVICTED),
    ],
)
def test_a_lost_pod_is_replaced_at_once_and_costs_nothing(fields: dict[str, object], reason: Reason) -> None:
    lost = replace(P0, **fields)  # type: ignore[arg-type]
    decision = decide(observed([lost, P1], [running(P0), running(P1)], training(P0, P1)), SETTINGS)
    assert decision.status.slots[0] == Slot(index=0, incarnation=1)
    assert names_of(decision, CreatePod) == ["r-0-1"]
    assert decision.status.restarts.by_reason == {reason: 1} and decision.status.restarts.failures == 0
    assert decision.membership.prepare == 2, "the others are called"
    assert names_of(decision, DeletePod) == ([] if lost.deleting else ["r-0-0"])


def test_a_pod_deleted_with_force_is_counted_once() -> None:
    decision = decide(observed([P1], [running(P1)], training(P0, P1)), SETTINGS)
    assert decision.status.restarts.by_reason == {"PodLost": 1}
    again = decide(observed([P1], [running(P1)], decision.status, prepare_age=1.0), SETTINGS)
    assert again.status.restarts == decision.status.restarts
    assert names_of(again, CreatePod) == ["r-0-1"], "the half-done action is repeated"


def test_a_silent_pod_is_left_out_after_its_lease_and_replaced_later() -> None:
    quiet = running(P0, age=4.0)
    left_out = decide(observed([P0, P1], [quiet, running(P1)], training(P0, P1)), SETTINGS)
    assert left_out.membership.prepare == 2 and left_out.status.slots[0].incarnation == 0
    silent = running(P0, age=11.0)
    replaced = decide(observed([P0, P1], [silent, running(P1)], training(P0, P1)), SETTINGS)
    assert replaced.status.slots[0].incarnation == 1 and replaced.status.avoided_nodes == ["node-0"]
    assert names_of(replaced, CreatePod) == ["r-0-1"] and names_of(replaced, DeletePod) == ["r-0-0"]


def test_a_broken_connection_shortens_the_lease() -> None:
    dropped = running(P0, age=1.5, dropped=1.2)
    decision = decide(observed([P0, P1], [dropped, running(P1)], training(P0, P1)), SETTINGS)
    assert decision.membership.prepare == 2


def test_after_the_operators_restart_members_have_time_to_report() -> None:
    status = training(P0, P1)
    young = {"heard_age": 1.0, "listening_age": 2.0}
    assert decide(observed([P0, P1], [running(P0)], status, **young), SETTINGS).membership.prepare == 1
    old = {"heard_age": 4.0, "listening_age": 5.0}
    assert decide(observed([P0, P1], [running(P0)], status, **old), SETTINGS).membership.prepare == 2
    nobody = {"heard_age": 0.0, "listening_age": 31.0}
    assert decide(observed([P0, P1], [], status, **nobody), SETTINGS).status.restarts.by_reason == {"Silent": 2}


def test_a_stuck_terminating_pod_does_not_block_its_replacement() -> None:
    dead = replace(P0, deleting=True)
    new = pod(0, 1)
    status = training(P1, slots=[Slot(index=0, incarnation=1), Slot(index=1)])
    decision = decide(observed([dead, new, P1], [running(P1)], status), SETTINGS)
    assert decision.actions == () and decision.status.restarts.disruptions == 0


def test_a_pod_is_removed_by_force_only_where_that_was_asked_for() -> None:
    dead = replace(P0, deleting=True, overdue=31.0)
    status = training(P1, slots=[Slot(index=0, incarnation=1), Slot(index=1)])
    o = observed([dead, pod(0, 1), P1], [running(P1)], status)
    assert decide(o, SETTINGS).actions == ()
    forceful = replace(SETTINGS, force_delete_seconds=30.0)
    assert decide(o, forceful).actions == (DeletePod("r-0-0", dead.uid, force=True),)


def test_a_failure_counts_in_the_write_that_publishes_the_next_generation() -> None:
    failed = agent(P0, AgentState.READY, 1, termination=ended(ExitCode.INTERNAL, rank=0))
    waiting = agent(P1, AgentState.READY, 1)
    called = decide(observed([P0, P1], [failed, running(P1)], training(P0, P1)), SETTINGS)
    assert called.status.restarts.failures == 0 and called.membership.prepare == 2
    published = decide(observed([P0, P1], [failed, waiting], training(P0, P1), prepare_age=1.0), SETTINGS)
    assert published.status.generation == 2 and published.status.restarts.failures == 1
    after = decide(observed([P0, P1], [failed, waiting], published.status), SETTINGS)
    assert after.status.restarts.failures == 1, "it ended the generation before"


def test_bad_data_ends_the_run_with_its_sentence_and_frees_the_pods() -> None:
    broken = agent(P0, AgentState.FAILED, 1, termination=ended(ExitCode.BAD_DATA))
    decision = decide(observed([P0, P1], [broken, running(P1)], training(P0, P1)), SETTINGS)
    assert decision.status.state == State.FAILED
    failed = conditions.find(decision.status, ConditionType.FAILED)
    assert failed is not None and failed.reason == Reason.INVALID_DATASET and "it broke" in failed.message
    assert decision.status.last_failure is not None and decision.status.last_failure.exit_code == 65
    told = [(event.reason, event.kind) for event in decision.events]
    assert told == [(Reason.INVALID_DATASET, "Warning")], "one event, though two conditions say it"
    assert names_of(decision, DeletePod) == ["r-0-0", "r-1-0"] and decision.membership.command == Command.STOP


def test_a_newcomer_that_fails_to_warm_up_is_replaced_and_counted() -> None:
    broken = agent(P1, AgentState.FAILED, 0, termination=ended(ExitCode.INTERNAL, step=0))
    status = training(P0, slots=[Slot(index=0), Slot(index=1)])
    decision = decide(observed([P0, P1], [running(P0), broken], status), SETTINGS)
    assert decision.status.slots[1].incarnation == 1 and decision.status.restarts.failures == 1
    young = decide(observed([P0, replace(P1, age=0.5)], [running(P0), broken], status), SETTINGS)
    assert young.status.slots[1].incarnation == 0, "a broken start is no busy loop"


def test_a_newcomer_that_is_too_small_for_what_others_train_costs_the_run_nothing() -> None:
    status = training(P0, slots=[Slot(index=0), Slot(index=1)], progress=Progress(step=7, total_steps=9))
    for number in range(5):
        place = pod(1, number)
        refused = agent(place, AgentState.FAILED, 0, termination=ended(ExitCode.BAD_CONFIG, step=0))
        decision = decide(observed([P0, place], [running(P0), refused], status), SETTINGS)
        assert decision.status.slots[1].incarnation == number + 1 and decision.status.members == status.members
        assert decision.status.restarts.by_reason == {"UnfitNode": number + 1} and not decision.status.failures
        assert decision.status.avoided_nodes == ["node-1"]
        (told,) = (event.message for event in decision.events if event.reason == Reason.UNFIT_NODE)
        assert told == f"r-1-{number} on node node-1 cannot join what others train: it broke"
        status = decision.status


@pytest.mark.parametrize(("total", "max_steps", "told"), [(1, None, 1), (4, None, 1), (5, None, 0), (1, 1, 0)])
def test_a_run_that_is_too_short_to_be_meant_is_told_once(total: int, max_steps: int | None, told: int) -> None:
    o = observed([P0], [running(P0, step=1, total=total)], training(P0), {"training": {"maxSteps": max_steps}})
    first = decide(o, SETTINGS)
    again = decide(replace(o, status=first.status), SETTINGS)
    events = [event for decision in (first, again) for event in decision.events if event.reason == Reason.FEW_STEPS]
    assert [event.kind for event in events] == ["Warning"] * told


def test_a_run_that_waits_says_which_nodes_it_avoids() -> None:
    small = agent(P1, AgentState.FAILED, 0, termination=ended(ExitCode.BAD_CONFIG, step=0))
    status = training(P0, slots=[Slot(index=0), Slot(index=1)], progress=Progress(step=7, total_steps=9))
    decision = decide(observed([P1], [small], status), SETTINGS)
    running = conditions.find(decision.status, ConditionType.RUNNING)
    assert running is not None and running.reason == Reason.TOO_FEW_NODES
    assert "; avoided unless there is no other: node-1" in running.message


def test_a_newcomer_that_is_too_small_for_a_run_that_nobody_has_trained_ends_it() -> None:
    refused = agent(P1, AgentState.FAILED, 0, termination=ended(ExitCode.BAD_CONFIG, step=0))
    start = training(generation=0, members=[], slots=[Slot(index=0), Slot(index=1)], conditions=[])
    decision = decide(observed([P0, P1], [agent(P0, AgentState.READY), refused], start), SETTINGS)
    assert decision.status.state == State.FAILED


def test_a_container_restart_is_judged_once() -> None:
    restarted = replace(P0, restarts=1, exit=Exit(137, "OOMKilled"))
    agents = [agent(P0, AgentState.WARMING), running(P1)]
    decision = decide(observed([restarted, P1], agents, training(P0, P1)), SETTINGS)
    assert decision.status.slots[0].restarts == 1 and decision.status.restarts.by_reason == {"OutOfMemory": 1}
    again = decide(observed([restarted, P1], agents, decision.status), SETTINGS)
    assert again.status.restarts == decision.status.restarts


@pytest.mark.parametrize(
    ("reason", "ends"),
    [(Reason.IMAGE_PULL_FAILED, True), (Reason.MISSING_SECRET, True), (Reason.UNSCHEDULABLE, False)],
)
def test_pods_that_cannot_start_are_named_and_free_their_gpus_in_time(reason: Reason, ends: bool) -> None:
    stuck = [pod(i, phase="Pending", trouble=Trouble(reason, "what to do")) for i in range(2)]
    pending = [condition(ConditionType.RUNNING, "False", Reason.PODS_PENDING, since=90)]
    waiting = training(conditions=pending, generation=0, members=[], slots=[Slot(index=0), Slot(index=1)])
    decision = decide(observed(stuck, [], waiting), SETTINGS)
    shown = conditions.find(decision.status, ConditionType.RUNNING)
    assert shown.reason == reason and "what to do" in shown.message and decision.status.state == State.PENDING
    old = [replace(each, age=301.0) for each in stuck]
    assert (decide(observed(old, [], waiting), SETTINGS).status.state == State.FAILED) is ends


def test_storage_out_of_reach_is_told_and_ends_the_run_in_time() -> None:
    broken = [agent(p, AgentState.WARMING, 0, termination=ended(ExitCode.STORAGE)) for p in (P0, P1)]
    pending = [condition(ConditionType.RUNNING, "False", Reason.PODS_PENDING, since=90)]
    status = training(P0, P1, conditions=pending, generation=0, members=[])
    decision = decide(observed([P0, P1], broken, status), SETTINGS)
    shown = conditions.find(decision.status, ConditionType.RUNNING)
    assert shown.reason == Reason.STORAGE_UNAVAILABLE and "it broke. Check endpoint, bucket" in shown.message
    assert decision.status.restarts.failures == 0 and decision.status.slots == status.slots
    old = [replace(each, age=301.0) for each in (P0, P1)]
    assert decide(observed(old, broken, status), SETTINGS).status.state == State.FAILED


@pytest.mark.parametrize(
    ("min_nodes", "reason", "words"),
    [
        (1, Reason.WARMING_UP, "0 of at least 1 nodes are ready; no room for more: 0/1 nodes"),
        (2, Reason.UNSCHEDULABLE, "0 of at least 2 nodes are ready; 0/1 nodes"),
    ],
)
def test_no_room_beyond_min_nodes_is_told_but_not_as_a_warning(min_nodes: int, reason: Reason, words: str) -> None:
    homeless = pod(1, phase="Pending", node="", trouble=Trouble(Reason.UNSCHEDULABLE, "0/1 nodes are available"))
    spec = {"elasticPolicy": {"minNodes": min_nodes, "maxNodes": 2}}
    waiting = training(P0, P1, conditions=[], generation=0, members=[])
    decision = decide(observed([P0, homeless], [agent(P0, AgentState.WARMING)], waiting, spec), SETTINGS)
    shown = conditions.find(decision.status, ConditionType.RUNNING)
    assert shown is not None and shown.reason == reason and shown.message.startswith(words)
    kinds = {event.kind for event in decision.events}
    assert kinds == ({"Warning"} if reason == Reason.UNSCHEDULABLE else {"Normal"})
    runs = decide(observed([P0, homeless], [running(P0)], training(P0, slots=waiting.slots), spec), SETTINGS)
    told = conditions.find(runs.status, ConditionType.RUNNING)
    assert told is not None and told.message.startswith("training on 1 of 2 nodes; ")
    assert ("no room for more: " in told.message) is (min_nodes == 1)


@pytest.mark.parametrize(
    ("gib", "says"), [(80, "NO_SHARD, micro batch 1, 0 of 2 layers recomputed, "), (0.1, "; the run needs ")]
)
def test_the_memory_plan_is_shown_and_when_it_does_not_fit_what_to_change(gib: float, says: str) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    spec = {"training": {"microBatchSize": 1}}
    made = plan(run(**spec).spec, {**shape, "vocab_size": 300}, int(gib * 2**30), 2)
    seen = observed([P0, P1], [running(P0), running(P1, plan=made)], training(P0, P1), spec)
    told = conditions.find(decide(seen, SETTINGS).status, ConditionType.RUNNING)
    assert told is not None and told.message.startswith("training on 2 of 2 nodes; ") and says in told.message


def test_a_quota_waits_and_an_invalid_pod_fails() -> None:
    quota = Refusal("r-0-0", 403, 'pods "r-0-0" is forbidden: exceeded quota: gpus')
    decision = decide(observed([], [], refusals=(quota,)), SETTINGS)
    assert conditions.find(decision.status, ConditionType.RUNNING).reason == Reason.QUOTA_EXCEEDED
    assert names_of(decision, CreatePod) == ["r-0-0", "r-1-0"], "it is tried again"
    invalid = Refusal("r-0-0", 422, 'Pod "r-0-0" is invalid: spec.containers[0].image')
    decision = decide(observed([], [], refusals=(invalid,)), SETTINGS)
    assert decision.status.state == State.FAILED
    assert "spec.containers[0].image" in conditions.find(decision.status, ConditionType.FAILED).message


def test_too_few_nodes_wait_and_say_so() -> None:
    two = {"elasticPolicy": {"minNodes": 2, "maxNodes": 2}}
    alone = agent(P1, AgentState.READY, 1)
    decision = decide(
        observed([P0, P1], [running(P0, age=4.0), alone], training(P0, P1), two, prepare_age=3.0), SETTINGS
    )
    assert decision.status.state == State.WAITING and decision.status.generation == 1
    shown = conditions.find(decision.status, ConditionType.RUNNING)
    assert shown.reason == Reason.TOO_FEW_NODES and "1 of at least 2" in shown.message


def test_a_member_that_never_comes_to_the_rendezvous_is_replaced() -> None:
    stuck = observed([P0, P1], [running(P0), agent(P1, AgentState.READY, 1)], training(P0, P1), prepare_age=121.0)
    decision = decide(stuck, SETTINGS)
    assert decision.status.slots[0].incarnation == 1 and decision.status.restarts.by_reason == {"Hung": 1}


def test_progress_is_written_now_and_then_only() -> None:
    status = training(P0, P1, progress=Progress(step=5, total_steps=100), progress_time=ago(1))
    status = decide(observed([P0, P1], [running(P0, step=5), running(P1)], status), SETTINGS).status
    soon = observed([P0, P1], [running(P0, step=6), running(P1)], status.model_copy(update={"progress_time": ago(1)}))
    decision = decide(soon, SETTINGS)
    assert decision.status == soon.status and decision.requeue_after <= 1.0
    later = replace(soon, status=status.model_copy(update={"progress_time": ago(2.5)}))
    assert decide(later, SETTINGS).status.progress.step == 6
    checkpoint = CheckpointStatus(step=5, uri="s3://c", time=NOW)
    saved = replace(soon, agents=(running(P0, step=6, checkpoint=checkpoint), running(P1)))
    assert decide(saved, SETTINGS).status.progress.step == 6, "with anything else it goes along"


def test_a_checkpoint_never_goes_back() -> None:
    newest = CheckpointStatus(step=20, uri="s3://new", time=NOW)
    old = CheckpointStatus(step=10, uri="s3://old", time=NOW)
    o = observed([P0], [running(P0, checkpoint=old)], training(P0, checkpoint=newest))
    assert decide(o, SETTINGS).status.checkpoint == newest


def test_a_run_whose_nodes_are_all_avoided_trains_on_and_says_so() -> None:
    """Avoiding is a wish to the scheduler: with no other room it takes the node, and a person can read why."""
    status = training(P0, P1, avoided_nodes=["node-1"], avoided_until={"node-1": ago(-600)})
    decision = decide(observed([P0, P1], [running(P0), running(P1)], status), SETTINGS)
    found = conditions.find(decision.status, ConditionType.RUNNING)
    assert found is not None and found.status == "True" and "; on node-1 for want of other nodes" in found.message


def test_an_avoided_node_is_told_and_forgiven_in_time() -> None:
    replaced = decide(observed([P0, P1], [running(P0, age=11.0), running(P1)], training(P0, P1)), SETTINGS)
    told = [event for event in replaced.events if event.reason == Reason.NODE_AVOIDED]
    assert [event.kind for event in told] == ["Warning"] and "node-0 was at fault" in told[0].message
    assert "until 2026-06-01 18:00 UTC" in told[0].message
    later = training(P0, P1, avoided_nodes=["node-0"], avoided_until={"node-0": NOW})
    forgiven = decide(observed([P0, P1], [running(P0), running(P1)], later), SETTINGS)
    assert forgiven.status.avoided_nodes == [] and forgiven.status.avoided_until == {}
    assert [event.reason for event in forgiven.events] == [Reason.NODE_FORGIVEN]


@pytest.mark.parametrize("code", [ExitCode.FAULTY_NODE, ExitCode.CORRUPT_BASE])
def test_a_members_node_at_fault_costs_its_pod_not_only_its_workers(code: ExitCode) -> None:
    failed = agent(P1, AgentState.FAILED, 1, termination=ended(code))
    decision = decide(observed([P0, P1], [running(P0), failed], training(P0, P1)), SETTINGS)
    assert decision.status.slots[1].incarnation == 1
    assert names_of(decision, DeletePod) == ["r-1-0"] and names_of(decision, CreatePod) == ["r-1-1"]
    assert decision.status.restarts.failures == 1 and decision.membership.prepare == 2
