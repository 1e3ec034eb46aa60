"""Conditions, the state word, and the events that follow from how status changed. Pure."""

from datetime import datetime
from typing import Literal

from qlora_api.names import ConditionType, Reason
from qlora_api.status import Condition, QLoRAFinetuneStatus, State
from qlora_operator.state import Event

WARNINGS = frozenset(
    {
        Reason.UNSCHEDULABLE,
        Reason.QUOTA_EXCEEDED,
        Reason.IMAGE_PULL_FAILED,
        Reason.MISSING_SECRET,
        Reason.MOUNT_FAILED,
        Reason.STORAGE_UNAVAILABLE,
        Reason.TOO_FEW_NODES,
        Reason.INVALID_SPEC,
    }
)


def find(status: QLoRAFinetuneStatus, kind: ConditionType) -> Condition | None:
    """The condition of this type, or None while it never was."""
    return next((condition for condition in status.conditions if condition.type == kind), None)


def is_true(status: QLoRAFinetuneStatus, kind: ConditionType) -> bool:
    """Whether the condition holds."""
    condition = find(status, kind)
    return condition is not None and condition.status == "True"


def put(
    status: QLoRAFinetuneStatus,
    kind: ConditionType,
    value: bool | None,
    reason: Reason,
    message: str,
    now: datetime,
) -> QLoRAFinetuneStatus:
    """Status with this condition; its transition time changes with its value only. None: Unknown."""
    word: Literal["True", "False", "Unknown"] = "Unknown" if value is None else "True" if value else "False"
    old = find(status, kind)
    since = old.last_transition_time if old is not None and old.status == word else now
    fresh = Condition(
        type=kind,
        status=word,
        reason=reason,
        message=message[:32768],
        last_transition_time=since,
        observed_generation=status.observed_generation,
    )
    if old is None:
        return status.model_copy(update={"conditions": [*status.conditions, fresh]})
    kept = [fresh if condition.type == kind else condition for condition in status.conditions]
    return status.model_copy(update={"conditions": kept})


def is_over(status: QLoRAFinetuneStatus) -> bool:
    """Complete or Failed: for good."""
    return is_true(status, ConditionType.COMPLETE) or is_true(status, ConditionType.FAILED)


def state_word(status: QLoRAFinetuneStatus, heard: bool) -> State:
    """One word for `kubectl get`. `heard`: an agent of a current pod has reported."""
    if is_true(status, ConditionType.COMPLETE):
        return State.SUCCEEDED
    if is_true(status, ConditionType.FAILED):
        return State.FAILED
    if is_true(status, ConditionType.SUSPENDED):
        return State.SUSPENDED
    if is_true(status, ConditionType.RUNNING):
        return State.RUNNING
    if has_started(status):
        return State.WAITING
    return State.STARTING if heard else State.PENDING


def epoch(status: QLoRAFinetuneStatus, now: datetime) -> datetime:
    """When the run started or was last resumed: deadlines count from here."""
    suspended = find(status, ConditionType.SUSPENDED)
    if suspended is not None and suspended.status == "False":
        return suspended.last_transition_time
    return status.start_time or now


def has_started(status: QLoRAFinetuneStatus) -> bool:
    """Whether it has trained since its epoch."""
    running = find(status, ConditionType.RUNNING)
    if running is None or status.start_time is None:
        return False
    return running.status == "True" or running.last_transition_time > epoch(status, status.start_time)


def events_between(old: QLoRAFinetuneStatus, new: QLoRAFinetuneStatus) -> tuple[Event, ...]:
    """What a person reads in `kubectl describe`: changes of conditions and of members."""
    events = []
    for condition in new.conditions:
        before = next((c for c in old.conditions if c.type == condition.type), None)
        if before is None or (before.status, before.reason) != (condition.status, condition.reason):
            failed = condition.type == ConditionType.FAILED or condition.reason in WARNINGS
            kind: Literal["Normal", "Warning"] = "Warning" if failed else "Normal"
            events.append(Event(condition.reason, condition.message or condition.type, kind))
    if new.generation > old.generation:
        names = ", ".join(member.pod_name for member in new.members)
        events.append(Event(Reason.MEMBERS_CHANGED, f"generation {new.generation}: {names}"))
    # Failed and Running may say the same: one event, the Warning.
    warned = {(event.reason, event.message) for event in events if event.kind == "Warning"}
    told_once = [e for e in events if e.kind == "Warning" or (e.reason, e.message) not in warned]
    return tuple(dict.fromkeys([*told_once, *_node_events(old, new), *_straggler_events(old, new)]))


def _node_events(old: QLoRAFinetuneStatus, new: QLoRAFinetuneStatus) -> list[Event]:
    """Nodes that are avoided from now on, and those that are not any more."""
    events = []
    for node in new.avoided_nodes:
        if node not in old.avoided_nodes:
            until = new.avoided_until[node].strftime("%Y-%m-%d %H:%M UTC")
            what = f"node {node} was at fault: new pods avoid it until {until} if another has room"
            events.append(Event(Reason.NODE_AVOIDED, what, "Warning"))
    forgiven = [node for node in old.avoided_nodes if node not in new.avoided_nodes]
    return [*events, *(Event(Reason.NODE_FORGIVEN, f"node {node} is no longer avoided") for node in forgiven)]


def _straggler_events(old: QLoRAFinetuneStatus, new: QLoRAFinetuneStatus) -> list[Event]:
    """Who holds up the others from now on, and who no longer does though it and others are still members."""
    known, slow = ({s.pod_name for s in status.stragglers} for status in (old, new))
    events = []
    for s in new.stragglers:
        if s.pod_name not in known:
            what = f"{s.pod_name} on node {s.node_name} works {s.ratio:.1f} times as long for a step as the others"
            advice = (
                "look at its GPU's clocks and temperature (nvidia-smi -q -d PERFORMANCE) and at the node's other load,"
                " or cordon the node and delete the pod: it starts elsewhere and no step is lost"
            )
            events.append(Event(Reason.STRAGGLER, f"{what} ({s.work_seconds:.2g} s) and all wait: {advice}", "Warning"))
    members = {member.pod_name for member in new.members}
    quicker = [s.pod_name for s in old.stragglers if s.pod_name not in slow and s.pod_name in members]
    recovered = quicker if is_true(new, ConditionType.RUNNING) and len(members) > 1 else []
    return [*events, *(Event(Reason.STRAGGLER_RECOVERED, f"{name} keeps up again") for name in recovered)]
