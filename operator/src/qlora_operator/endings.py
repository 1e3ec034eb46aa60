"""What ends a run from outside its failures: success, refusal, deadlines. An ordered list of small rules; pure."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from qlora_api.names import ConditionType, Reason
from qlora_operator import agents
from qlora_operator.conditions import epoch, has_started
from qlora_operator.settings import Settings
from qlora_operator.state import Observed


@dataclass(frozen=True)
class RunEnd:
    """The run is over, for this reason."""

    condition: ConditionType
    reason: Reason
    message: str


def finished(o: Observed, settings: Settings) -> RunEnd | None:
    """A member says that the adapter and its manifest are in the bucket."""
    found = agents.artifacts(o)
    if found is None:
        return None
    return RunEnd(ConditionType.COMPLETE, Reason.ADAPTER_UPLOADED, f"the adapter is at {found.adapter_uri}")


def refused(o: Observed, settings: Settings) -> RunEnd | None:
    """The API server refuses the pods themselves: trying again changes nothing."""
    trouble = agents.worst_trouble(o)
    if trouble is None or trouble.reason != Reason.INVALID_SPEC:
        return None
    return RunEnd(ConditionType.FAILED, trouble.reason, trouble.message)


def active_too_long(o: Observed, settings: Settings) -> RunEnd | None:
    """activeDeadlineSeconds from the start or the last resumption."""
    limit = o.run.spec.active_deadline_seconds
    if limit is None or o.run.spec.suspend or o.now - epoch(o.status, o.now) < timedelta(seconds=limit):
        return None
    message = f"the run was active for activeDeadlineSeconds ({limit} s); its newest checkpoint stays in the bucket"
    return RunEnd(ConditionType.FAILED, Reason.ACTIVE_DEADLINE_EXCEEDED, message)


def not_started(o: Observed, settings: Settings) -> RunEnd | None:
    """startDeadlineSeconds without minNodes warm."""
    limit = o.run.spec.start_deadline_seconds
    if limit is None or o.run.spec.suspend or has_started(o.status):
        return None
    if o.now - epoch(o.status, o.now) < timedelta(seconds=limit):
        return None
    trouble = agents.worst_trouble(o)
    why = f": {trouble.message}" if trouble else "; look at the pods' events and logs"
    message = f"fewer than minNodes were ready within startDeadlineSeconds ({limit} s){why}"
    return RunEnd(ConditionType.FAILED, Reason.START_DEADLINE_EXCEEDED, message)


def blocked(o: Observed, settings: Settings) -> RunEnd | None:
    """No pod can start for want of its image, a Secret or its data: they would hold their GPUs for ever."""
    live = agents.current_pods(o, o.status.slots)
    holding = (Reason.IMAGE_PULL_FAILED, Reason.MISSING_SECRET, Reason.STORAGE_UNAVAILABLE)
    stuck = [pod for pod, trouble in agents.troubles(o) if trouble.reason in holding]
    if o.run.spec.suspend or not live or len(stuck) < len(live):
        return None
    trouble = agents.worst_trouble(o)
    if trouble is None or min(pod.age for pod in stuck) < settings.blocked_seconds:
        return None
    return RunEnd(ConditionType.FAILED, trouble.reason, trouble.message)


EndRule = Callable[[Observed, Settings], RunEnd | None]
RULES: tuple[EndRule, ...] = (finished, refused, active_too_long, not_started, blocked)


def find(o: Observed, settings: Settings) -> RunEnd | None:
    """The first rule that ends the run."""
    return next((end for rule in RULES if (end := rule(o, settings))), None)


def deadlines(o: Observed) -> list[float]:
    """Seconds until time alone may end the run."""
    spec = o.run.spec
    since = (o.now - epoch(o.status, o.now)).total_seconds()
    limits = [spec.active_deadline_seconds, None if has_started(o.status) else spec.start_deadline_seconds]
    return [] if spec.suspend else [limit - since for limit in limits if limit is not None]
