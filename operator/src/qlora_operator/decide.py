"""`decide(observed) -> decision`: everything that the operator does about a run, as a pure function.

Its rules, in the order in which they apply:

1. Over is over: a complete or failed run stays so and keeps wanting no pods; its time to live may delete it.
2. What ends a run ends it: artifacts uploaded, refused pods, deadlines (endings.py).
3. A suspended run stops at a step boundary, saves, and gives its pods back.
4. Otherwise it trains: places of lost pods move on (slots.py), ends are judged (failure.py), members change in two
   phases (membership.py), missing pods are created (pods.py).

The status is written before the actions that rely on it; a crash between any two writes is repaired by the next pass.
Progress alone is written at most every `status_interval_seconds`.
"""

from dataclasses import replace
from datetime import timedelta

from qlora_api.names import ConditionType, Reason
from qlora_api.run import AgentState, Command, ExitCode, Membership
from qlora_api.status import Nodes, QLoRAFinetuneStatus, Slot, State
from qlora_operator import agents, conditions, endings, failure, membership, pods, slots, stragglers
from qlora_operator.conditions import is_over, is_true, put
from qlora_operator.endings import RunEnd
from qlora_operator.exits import Ending
from qlora_operator.membership import Phase, Plan
from qlora_operator.settings import Settings
from qlora_operator.state import Action, ApplyObject, CreatePod, Decision, DeleteRun, Event, Observed, Pod

FEW_STEPS = 5  # a run of fewer is told so
SOONEST = 0.05


def decide(observed: Observed, settings: Settings, ca_bundle: str = "") -> Decision:
    """What to write, tell and do now. The same observation gives the same decision."""
    if is_over(observed.status):
        return _finish(observed, _wind_down(observed, settings), settings)
    o = replace(observed, status=_see(observed, settings))
    if end := endings.find(o, settings):
        decision = _end(o, end, settings)
    elif o.run.spec.suspend:
        decision = _suspend(o, settings)
    else:
        decision = _train(o, settings, ca_bundle)
    return _finish(observed, decision, settings)


def _see(o: Observed, settings: Settings) -> QLoRAFinetuneStatus:
    """Status with what is simply seen: the spec's generation, start, resumption, progress, checkpoint, time."""
    progress = agents.newest_progress(o)
    advanced = progress.step > o.status.progress.step
    status = failure.forgive(o.status, o.now, settings.avoid_seconds).model_copy(
        update={
            "observed_generation": o.run.generation,
            "start_time": o.status.start_time or o.now,
            "progress": progress,
            "progress_time": o.now if advanced else o.status.progress_time,
            "checkpoint": agents.newest_checkpoint(o),
            "stragglers": stragglers.find(o.status.stragglers, agents.parts(o), o.now),
        }
    )
    suspended = conditions.find(status, ConditionType.SUSPENDED)
    if suspended is not None and suspended.status != "False" and not o.run.spec.suspend:
        status = put(status, ConditionType.SUSPENDED, False, Reason.RESUMED, "spec.suspend is false", o.now)
    return status


def _train(o: Observed, settings: Settings, ca_bundle: str) -> Decision:
    """Keep places filled and members together."""
    placement = slots.place(o, settings)
    status, events = o.status.model_copy(update={"slots": placement.slots}), list[Event]()
    for group in failure.incidents(placement.endings):
        status, end, event = _account(o, status, group, settings)
        if end is not None:
            return _end(replace(o, status=status), end, settings)
        events += event
    o = replace(o, status=status)
    plan = membership.plan(agents.view_of(o, placement.slots, settings))
    ends = agents.ends_of_generation(o, placement.slots, settings)
    judged, end, event = _account(o, status, ends, settings)
    if end is not None:
        return _end(replace(o, status=judged), end, settings)
    if plan.phase == Phase.PUBLISHED:
        status, events = judged, [*events, *event]
        status = status.model_copy(update={"generation": plan.generation, "members": list(plan.members)})
    status = _describe(o, status, plan, settings)
    answer = _answer(status, plan.prepare, Command.RUN)
    times = [*_times(o, plan, settings), *endings.deadlines(o)]
    times += [placement.recheck] if placement.recheck is not None else []
    actions = (*slots.superseded(o, placement.slots, settings), *_creations(o, status, settings, ca_bundle))
    return Decision(status, answer, actions, tuple(events), min(times, default=settings.resync_seconds))


def _account(
    o: Observed, status: QLoRAFinetuneStatus, ends: tuple[Ending, ...], settings: Settings
) -> tuple[QLoRAFinetuneStatus, RunEnd | None, list[Event]]:
    """Judge ends that belong together: the status that remembers them, whether they end the run, what to tell."""
    verdict = failure.judge(ends, status, o.run.spec.failure_policy, o.now)
    if verdict is None or verdict.effect == "Ignore":
        return status, None, []
    status = failure.record(verdict, status, o.run.spec.failure_policy, o.now, settings.avoid_seconds)
    if verdict.effect == "Fail":
        return status, RunEnd(ConditionType.FAILED, verdict.reason, verdict.message), []
    return status, None, [Event(verdict.reason, verdict.message, "Warning" if verdict.effect == "Count" else "Normal")]


def _creations(o: Observed, status: QLoRAFinetuneStatus, settings: Settings, ca_bundle: str) -> tuple[Action, ...]:
    """Pods for the places that have none, after the objects that they mount."""
    missing: list[Slot] = slots.missing(o, status.slots)
    if not missing:
        return ()
    bodies = [pods.build_pod(o.run, slot, status.avoided_nodes, settings) for slot in missing]
    shared = (ApplyObject(pods.build_config(o.run, ca_bundle)), ApplyObject(pods.build_account(o.run)))
    return (*shared, *(CreatePod(body["metadata"]["name"], body) for body in bodies))


def _describe(o: Observed, status: QLoRAFinetuneStatus, plan: Plan, settings: Settings) -> QLoRAFinetuneStatus:
    """Condition Running and the counts of nodes."""
    policy = o.run.spec.elastic_policy
    found = {candidate.member.pod_uid for candidate in agents.candidates(o, status.slots, settings)}
    active = sum(member.pod_uid in found for member in status.members)
    nodes = Nodes(desired=policy.max_nodes, ready=len(found), active=active)
    status = status.model_copy(update={"nodes": nodes, "nodes_summary": f"{active}/{policy.max_nodes}"})
    trouble = agents.worst_trouble(o)
    spare = agents.only_spare_places_lack_room(o)  # no Warning: the run does not wait for them
    also = f"; {'no room for more: ' if spare else ''}{trouble.message}" if trouble else ""
    if plan.too_few:
        missing = f"{len(found)} of at least {policy.min_nodes} nodes are ready"
        reason = trouble.reason if trouble and not spare else _waiting_reason(o, status)
        return put(status, ConditionType.RUNNING, False, reason, f"{missing}{also}{_avoiding(status)}", o.now)
    runs = any(
        agent.report.state == AgentState.RUNNING and agent.report.generation == status.generation
        for agent in o.agents
        if agents.is_member(o, agent.pod_uid)
    )
    if runs and plan.phase == Phase.STEADY:
        where = f"{len(status.members)} of {policy.max_nodes} nodes{_on_avoided(status)}"
        message = f"training on {where}{_planned(o)}{also}"
        return put(status, ConditionType.RUNNING, True, Reason.TRAINING, message, o.now)
    if is_true(status, ConditionType.RUNNING):
        return status
    message = f"the members are starting{also}"
    return put(status, ConditionType.RUNNING, False, Reason.WARMING_UP, message, o.now)


def _planned(o: Observed) -> str:
    """How the base lies on the present nodes and what the plan counts; what to change when that is too much."""
    made = agents.memory_plan(o)
    return "" if made is None else f"; {made.summary()}{'; ' * (not made.fits)}{made.advice()}"


def _on_avoided(status: QLoRAFinetuneStatus) -> str:
    """Members on nodes at fault: the scheduler found no other room, and a run on a bad node is better than none."""
    nodes = sorted({member.node_name for member in status.members} & set(status.avoided_nodes))
    return f"; on {', '.join(nodes)} for want of other nodes, though avoided for faults" if nodes else ""


def _avoiding(status: QLoRAFinetuneStatus) -> str:
    """Where pods of a run that waits for nodes go last: all that is left may be at fault or too small."""
    nodes = ", ".join(sorted(status.avoided_nodes))
    return f"; avoided unless there is no other: {nodes} (the events say why)" if nodes else ""


def _waiting_reason(o: Observed, status: QLoRAFinetuneStatus) -> Reason:
    if conditions.has_started(status):
        return Reason.TOO_FEW_NODES
    started = any(pod.phase == "Running" for pod in agents.current_pods(o, status.slots))
    return Reason.WARMING_UP if started else Reason.PODS_PENDING


def _times(o: Observed, plan: Plan, settings: Settings) -> list[float]:
    """Seconds after which time alone may change the decision."""
    times = [settings.resync_seconds]
    if plan.recheck is not None:
        times.append(plan.recheck)
    for pod in agents.current_pods(o, o.status.slots):
        agent = agents.agent_of(o, pod)
        if agent is not None:
            limits = [settings.lease_seconds - agent.age, settings.silent_seconds - agent.age]
            if agent.dropped is not None:
                limits.append(settings.drop_seconds - agent.dropped)
            times += [limit for limit in limits if limit > -SOONEST]
        elif agents.is_member(o, pod.uid):
            times.append(settings.lease_seconds)
        elif pod.trouble is not None:
            times += [limit for limit in [settings.blocked_seconds - pod.age] if limit > -SOONEST]
    if agents.all_run(o, settings):
        limit = agents.hang_limit(o, settings) - agents.quiet_seconds(o)
        times += [limit] if limit > -SOONEST else []
    if o.prepare_age is not None:
        times.append(max(settings.prepare_timeout_seconds - o.prepare_age, 1.0))
    return times


def _suspend(o: Observed, settings: Settings) -> Decision:
    """Stop at a step boundary, save, then give the pods back."""
    status = o.status
    condition = conditions.find(status, ConditionType.SUSPENDED)
    since = condition.last_transition_time if condition is not None and condition.status == "Unknown" else o.now
    left = settings.suspend_grace_seconds - (o.now - since).total_seconds()
    saving = [pod for pod in o.pods if pod.live and _is_saving(o, pod, settings)]
    if saving and left > 0 and not is_true(status, ConditionType.SUSPENDED):
        message = f"{len(saving)} pods stop at a step boundary and save"
        status = put(status, ConditionType.SUSPENDED, None, Reason.SUSPENDING, message, o.now)
        answer = _answer(status, status.generation, Command.STOP)
        unwanted = slots.superseded(o, status.slots, settings)
        return Decision(status, answer, unwanted, (), min(left, settings.drop_seconds))
    message = "spec.suspend is true; set it to false to go on from the newest checkpoint"
    nodes = {"nodes": Nodes(), "nodes_summary": "0/0", "slots": slots.release(o), "stragglers": []}
    status = status.model_copy(update=nodes)
    status = put(status, ConditionType.RUNNING, False, Reason.SUSPENDED, message, o.now)
    status = put(status, ConditionType.SUSPENDED, True, Reason.SUSPENDED, message, o.now)
    answer = _answer(status, status.generation, Command.STOP)
    return Decision(status, answer, slots.superseded(o, [], settings), (), settings.resync_seconds)


def _is_saving(o: Observed, pod: Pod, settings: Settings) -> bool:
    """A live member that has not yet said that it stopped."""
    agent = agents.agent_of(o, pod)
    if agent is None:
        return agents.is_member(o, pod.uid) and agents.silence(o, pod) <= settings.lease_seconds
    if not agents.is_member(o, pod.uid) or not agents.is_alive(agent, settings) or pod.ended:
        return False
    stopped = agent.failure is not None and agent.failure.exit_code == ExitCode.STOPPED
    return agent.report.generation > 0 and not stopped


def _end(o: Observed, end: RunEnd, settings: Settings) -> Decision:
    """Record the ending and let the pods go."""
    status = put(o.status, ConditionType.RUNNING, False, end.reason, end.message, o.now)
    status = put(status, end.condition, True, end.reason, end.message, o.now)
    final = {"completion_time": o.now, "artifacts": agents.artifacts(o) or status.artifacts}
    return _wind_down(replace(o, status=status.model_copy(update=final)), settings)


def _wind_down(o: Observed, settings: Settings) -> Decision:
    """No pod is wanted any more; the resource goes when its time to live is over."""
    actions: tuple[Action, ...] = slots.superseded(o, [], settings)
    requeue, ttl = float("inf"), o.run.spec.ttl_seconds_after_finished
    if ttl is not None and o.status.completion_time is not None:
        requeue = (o.status.completion_time + timedelta(seconds=ttl) - o.now).total_seconds()
        actions = (*actions, DeleteRun(o.run.identity.uid)) if requeue <= 0 else actions
    status = o.status.model_copy(update={"nodes": Nodes(), "nodes_summary": "0/0", "stragglers": []})
    return Decision(status, _answer(status, status.generation, Command.STOP), actions, (), requeue)


def _few_steps(o: Observed, new: QLoRAFinetuneStatus) -> tuple[Event, ...]:
    """Told once, when the trainer has counted the samples: a run so short that nobody can have meant it."""
    total = new.progress.total_steps
    meant = o.run.spec.training.max_steps is not None
    if meant or o.status.progress.total_steps or not 0 < total < FEW_STEPS:
        return ()
    advice = "raise training.epochs or lower training.globalBatchSize if it is to learn more"
    return (Event(Reason.FEW_STEPS, f"{total} optimizer step{'s' * (total > 1)} in all: {advice}", "Warning"),)


def _answer(status: QLoRAFinetuneStatus, prepare: int, command: Command) -> Membership:
    return Membership(generation=status.generation, members=status.members, prepare=prepare, command=command)


def _present(status: QLoRAFinetuneStatus) -> QLoRAFinetuneStatus:
    """Speed and time to go are of now: a run that waits, is suspended or failed has neither."""
    if status.state in (State.RUNNING, State.SUCCEEDED):
        return status
    progress = status.progress.model_copy(update={"tokens_per_second": None, "eta_seconds": None})
    return status.model_copy(update={"progress": progress})


def _finish(before: Observed, decision: Decision, settings: Settings) -> Decision:
    """The state word, the throttle on progress, the events, a requeue within bounds."""
    old, new = before.status, decision.status
    heard = any(agents.agent_of(before, pod) is not None for pod in before.pods if pod.live)
    new = _present(new.model_copy(update={"state": conditions.state_word(new, heard)}))
    requeue = min(max(decision.requeue_after, SOONEST), settings.resync_seconds)
    kept = new.model_copy(update={"progress": old.progress, "progress_time": old.progress_time})
    if kept == old and new != old and old.progress_time is not None:
        left = settings.status_interval_seconds - (before.now - old.progress_time).total_seconds()
        new, requeue = (old, min(requeue, max(left, SOONEST))) if left > 0 else (new, requeue)
    events = (*decision.events, *conditions.events_between(old, new), *_few_steps(before, new))
    return replace(decision, status=new, events=events, requeue_after=requeue)
