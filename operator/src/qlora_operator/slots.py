"""The run's pod places: which pods hold them, which must be replaced and why, which must go.

A place keeps its index; its pod is replaced by raising the incarnation in status, and every pod that is not the current
incarnation of a wanted place is deleted. A pod that hangs in Terminating on a dead node therefore blocks nothing, and
an end is judged exactly once: by the same status write that raises the incarnation (or the count of restarts).
"""

from dataclasses import dataclass

from qlora_api import names
from qlora_api.names import Reason
from qlora_api.run import NODE_FAULTS, AgentState, ExitCode
from qlora_api.status import Slot
from qlora_operator import agents, exits
from qlora_operator.exits import Ending
from qlora_operator.settings import Settings
from qlora_operator.state import DeletePod, Observed, Pod

EVICTIONS = ("Evicted", "EvictionByEvictionAPI", "PreemptionByScheduler", "TerminationByKubelet", "Terminated")
NODE_LOSSES = ("DeletionByTaintManager", "DeletionByPodGC", "NodeLost", "NodeShutdown", "Shutdown")
_LONGEST_BACKOFF = 60.0


@dataclass(frozen=True)
class Placement:
    """The places from now on, what ended, and when time alone may change them."""

    slots: list[Slot]
    endings: tuple[Ending, ...]
    recheck: float | None = None


def place(o: Observed, settings: Settings) -> Placement:
    """Raise the incarnation of every place whose pod is gone for good."""
    known = {slot.index: slot for slot in o.status.slots}
    max_nodes = o.run.spec.elastic_policy.max_nodes
    slots: list[Slot] = []
    endings: list[Ending] = []
    waits: list[float] = []
    for index in range(max(max_nodes, max(known, default=-1) + 1)):
        slot = known.get(index, Slot(index=index))
        pod = _pod_of(o, slot)
        if index >= max_nodes:
            slots.append(_advance(slot) if pod is not None else slot)
            continue
        ending = _why_replace(o, slot, pod, settings)
        wait = 0.0 if pod is None else _backoff(slot, ending) - pod.age
        if ending is not None and wait > 0:
            waits.append(wait)
            ending = None
        if ending is not None:
            endings.append(ending)
            slot = _advance(slot)
        elif pod is not None and pod.restarts > slot.restarts and pod.exit is not None:
            endings.append(exits.of_container(pod, agents.newest_progress(o).step))
            slot = slot.model_copy(update={"restarts": pod.restarts})
        slots.append(slot)
    return Placement(slots, tuple(endings), min(waits, default=None))


def release(o: Observed) -> list[Slot]:
    """Every place whose pod exists moves on: the pods will be deleted, and that is no loss."""
    return [_advance(slot) if _pod_of(o, slot) is not None else slot for slot in o.status.slots]


def missing(o: Observed, slots: list[Slot]) -> list[Slot]:
    """Wanted places without a pod."""
    return [slot for slot in slots if slot.index < o.run.spec.elastic_policy.max_nodes and _pod_of(o, slot) is None]


def superseded(o: Observed, slots: list[Slot], settings: Settings) -> tuple[DeletePod, ...]:
    """Deletions of all pods that hold no wanted place; by force only where the settings allow it."""
    held = {(slot.index, slot.incarnation) for slot in slots if slot.index < o.run.spec.elastic_policy.max_nodes}
    unwanted = [pod for pod in o.pods if (pod.index, pod.incarnation) not in held]
    patience = settings.force_delete_seconds
    stuck = [pod for pod in unwanted if pod.deleting and 0 < patience <= pod.overdue]
    return (
        *(DeletePod(pod.name, pod.uid) for pod in unwanted if not pod.deleting),
        *(DeletePod(pod.name, pod.uid, force=True) for pod in stuck),
    )


def _advance(slot: Slot) -> Slot:
    return Slot(index=slot.index, incarnation=slot.incarnation + 1)


def _pod_of(o: Observed, slot: Slot) -> Pod | None:
    return next((pod for pod in o.pods if (pod.index, pod.incarnation) == (slot.index, slot.incarnation)), None)


def _backoff(slot: Slot, ending: Ending | None) -> float:
    """Least life of a pod before it is replaced for failing to start, so that a broken start is no busy loop."""
    if ending is None or ending.reason in (Reason.SILENT, Reason.HUNG, Reason.NODE_LOST):
        return 0.0
    return min(_LONGEST_BACKOFF, 2.0 ** min(slot.incarnation, 10))


def _why_replace(o: Observed, slot: Slot, pod: Pod | None, settings: Settings) -> Ending | None:
    """The end of the place's pod, or None while it may live on."""
    step = agents.newest_progress(o).step
    if pod is None:
        name = names.pod_name(o.run.identity.name, slot.index, slot.incarnation)
        member = next((member for member in o.status.members if member.pod_name == name), None)
        gone = f"{name} vanished"
        return Ending(name, member.node_name, Reason.POD_LOST, message=gone, step=step) if member else None
    if pod.deleting or pod.phase in ("Failed", "Succeeded"):
        return Ending(pod.name, pod.node, _loss(pod), message=f"{pod.name} {pod.reason or 'was deleted'}", step=step)
    quiet = agents.silence(o, pod)
    if quiet > settings.silent_seconds and not pod.ended:
        message = f"{pod.name} on node {pod.node} has not reported for {settings.silent_seconds:.0f} s"
        return Ending(pod.name, pod.node, Reason.SILENT, message=message, step=step)
    return _failed_start(o, pod, settings) or _late(o, pod, settings)


def _loss(pod: Pod) -> Reason:
    if pod.reason in NODE_LOSSES:
        return Reason.NODE_LOST
    return Reason.EVICTED if pod.reason in EVICTIONS else Reason.POD_LOST


def _failed_start(o: Observed, pod: Pod, settings: Settings) -> Ending | None:
    """A newcomer failed while warming up, or a member's node is at fault: another pod, elsewhere if possible."""
    agent = agents.agent_of(o, pod)
    if agent is None or agent.failure is None:
        return None
    member = agents.is_member(o, pod.uid)
    failed_newcomer = agent.report.state == AgentState.FAILED and not member
    if failed_newcomer and agent.failure.exit_code == ExitCode.STORAGE and pod.age < settings.blocked_seconds:
        return None  # it tries again by itself; `agents.troubles` tells
    if failed_newcomer and agent.failure.exit_code == ExitCode.BAD_CONFIG and (step := agents.newest_progress(o).step):
        message = f"{pod.name} on node {pod.node} cannot join what others train: {agent.failure.message}"
        return Ending(pod.name, pod.node, Reason.UNFIT_NODE, message=message, step=step)
    node_fault = agent.failure.exit_code in NODE_FAULTS and agent.failure_generation == o.status.generation
    if failed_newcomer or (member and node_fault):
        return exits.of_termination(pod.name, pod.node, agent.failure)
    return None


def _late(o: Observed, pod: Pod, settings: Settings) -> Ending | None:
    """A live member that did not come to the rendezvous for so long will not come."""
    agent = agents.agent_of(o, pod)
    if o.prepare_age is None or o.prepare_age <= settings.prepare_timeout_seconds or agent is None:
        return None
    if agent.report.state == AgentState.READY or not agents.is_member(o, pod.uid):
        return None
    message = f"{pod.name} did not come to the rendezvous within {settings.prepare_timeout_seconds:.0f} s."
    return Ending(pod.name, pod.node, Reason.HUNG, int(ExitCode.INTERNAL), message, step=o.status.progress.step)
