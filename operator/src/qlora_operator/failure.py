"""What an end means: who is to blame, whether it counts, whether the run may go on.

The rules, first match wins (`RULES`):

* an exit code that can't get better (bad spec, data, model, adapter) fails the run at once;
* an end that was asked for (stopped, fenced, finished) is none;
* ends that are not the run's fault (lost nodes, evictions, lost peers, a newcomer's GPU that is too small for what
  others train) are disruptions: free, counted apart;
* the same failure at another place a moment later belongs to the same incident;
* the same reason at the same step for the third time fails the run: trying again would end the same way;
* more than maxFailures within windowSeconds fail the run;
* everything else counts once and the run goes on.

When several pods end together, the one end that explains the others is judged: a lost peer follows from its fate.
Every counted end is remembered in status by the write that acts on it, so a crash neither forgets nor repeats it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from qlora_api import names
from qlora_api.names import Reason
from qlora_api.run import NEVER_RETRIED, ExitCode
from qlora_api.status import FailureRecord, LastFailure, QLoRAFinetuneStatus, Restarts
from qlora_api.types import FailurePolicy
from qlora_operator.exits import FATAL_REASONS, Ending, advised, describe

SAME_STEP_LIMIT = 3
NODE_FAULT_LIMIT = 2
INCIDENT_SECONDS = 15.0
_KEPT_RECORDS = 64
_AVOIDED_AT_ONCE = (Reason.SILENT, Reason.NODE_LOST, Reason.CORRUPT_BASE, Reason.UNFIT_NODE)


@dataclass(frozen=True)
class Verdict:
    """What an end means for the run."""

    effect: Literal["Fail", "Count", "Free", "Ignore"]
    reason: Reason
    message: str
    ending: Ending


@dataclass(frozen=True)
class Case:
    """What a rule sees: the end that explains the others, and the record."""

    ending: Ending
    status: QLoRAFinetuneStatus
    policy: FailurePolicy
    now: datetime

    @property
    def recent(self) -> list[FailureRecord]:
        """Failures inside the window."""
        since = self.now - timedelta(seconds=self.policy.window_seconds)
        return [record for record in self.status.failures if record.time > since]


def judge(
    endings: tuple[Ending, ...], status: QLoRAFinetuneStatus, policy: FailurePolicy, now: datetime
) -> Verdict | None:
    """The verdict on ends that happened together; None when nothing ended."""
    if not endings:
        return None
    case = Case(min(endings, key=_blame), status, policy, now)
    return next(verdict for rule in RULES if (verdict := rule(case)))


def incidents(endings: tuple[Ending, ...]) -> list[tuple[Ending, ...]]:
    """Ends of one pass that are judged together: each disruption for itself, all exits as one."""
    exits = tuple(ending for ending in endings if ending.exit_code is not None)
    disruptions = [(ending,) for ending in endings if ending.exit_code is None]
    return [*disruptions, *([exits] if exits else [])]


def _blame(ending: Ending) -> tuple[int, int]:
    """Lowest first: what can't be retried, what counts, what came from outside, what merely followed."""
    if ending.exit_code in NEVER_RETRIED:
        weight = 0
    elif ending.counts:
        weight = 1
    elif ending.exit_code is None:
        weight = 2
    else:
        weight = 3
    return weight, ending.rank if ending.rank is not None else 1 << 30


def never_retried(case: Case) -> Verdict | None:
    """A spec, data set, model or adapter that cannot work."""
    if case.ending.exit_code not in NEVER_RETRIED:
        return None
    reason = FATAL_REASONS[ExitCode(case.ending.exit_code)]
    return Verdict("Fail", reason, advised(case.ending.message or reason, reason), case.ending)


def asked_for(case: Case) -> Verdict | None:
    """Told to stop, fenced off, or done."""
    ending = case.ending
    if ending.counts or ending.exit_code in (None, ExitCode.LOST_PEER):
        return None
    return Verdict("Ignore", ending.reason, ending.message, ending)


def disruption(case: Case) -> Verdict | None:
    """Nobody's fault: free."""
    if case.ending.counts:
        return None
    return Verdict("Free", case.ending.reason, case.ending.message or describe(case.ending), case.ending)


def same_incident(case: Case) -> Verdict | None:
    """What befalls several pods at once counts once; a place whose next pod fails again is another matter."""
    ending, last = case.ending, case.status.last_failure
    if last is None or (last.reason, last.step) != (ending.reason, ending.step):
        return None
    if names.place_of(last.pod_name) == names.place_of(ending.pod_name):
        return None
    if case.now - last.time > timedelta(seconds=INCIDENT_SECONDS):
        return None
    return Verdict("Ignore", ending.reason, ending.message, ending)


def same_step_again(case: Case) -> Verdict | None:
    """The third failure of one kind at one step."""
    ending = case.ending
    if ending.reason in (Reason.STORAGE_UNAVAILABLE, Reason.FAULTY_NODE):
        return None  # the step has nothing to do with it
    same = [record for record in case.recent if record.step == ending.step and record.reason == ending.reason]
    if len(same) + 1 < SAME_STEP_LIMIT:
        return None
    message = f"step {ending.step} failed {SAME_STEP_LIMIT} times with {ending.reason}: {describe(ending)}"
    return Verdict("Fail", Reason.REPEATED_STEP_FAILURE, message, ending)


def too_many(case: Case) -> Verdict | None:
    """More failures than the policy allows."""
    count = len(case.recent) + 1
    if count <= case.policy.max_failures:
        return None
    window = f"{count} failures within {case.policy.window_seconds} s (failurePolicy.maxFailures is"
    message = f"{window} {case.policy.max_failures}); the last one was {case.ending.reason}: {describe(case.ending)}"
    return Verdict("Fail", Reason.FAILURE_LIMIT_REACHED, message, case.ending)


def counted(case: Case) -> Verdict:
    """One failure among those allowed."""
    return Verdict("Count", case.ending.reason, describe(case.ending), case.ending)


Rule = Callable[[Case], Verdict | None]
RULES: tuple[Rule, ...] = (
    never_retried,
    asked_for,
    disruption,
    same_incident,
    same_step_again,
    too_many,
    counted,
)


def record(
    verdict: Verdict, status: QLoRAFinetuneStatus, policy: FailurePolicy, now: datetime, avoid_seconds: float
) -> QLoRAFinetuneStatus:
    """The status that remembers the verdict; its node, if it is to blame, is avoided for `avoid_seconds`."""
    until = now + timedelta(seconds=avoid_seconds)
    ending, restarts = verdict.ending, status.restarts
    by_reason = {**restarts.by_reason, ending.reason: restarts.by_reason.get(ending.reason, 0) + 1}
    if verdict.effect == "Free":
        more = Restarts(disruptions=restarts.disruptions + 1, failures=restarts.failures, by_reason=by_reason)
        return _avoid(status.model_copy(update={"restarts": more}), verdict, until)
    newest = FailureRecord(time=now, reason=ending.reason, step=ending.step, node_name=ending.node_name)
    records = [*Case(ending, status, policy, now).recent, newest][-_KEPT_RECORDS:]
    counted_status = status.model_copy(
        update={
            "failures": records,
            "restarts": Restarts(disruptions=restarts.disruptions, failures=restarts.failures + 1, by_reason=by_reason),
            "last_failure": LastFailure(
                time=now,
                reason=ending.reason,
                message=verdict.message[:4096],
                pod_name=ending.pod_name,
                node_name=ending.node_name,
                rank=ending.rank,
                exit_code=ending.exit_code,
                step=ending.step,
                log_tail=ending.log_tail[-4096:],
            ),
        }
    )
    return _avoid(counted_status, verdict, until)


def forgive(status: QLoRAFinetuneStatus, now: datetime, avoid_seconds: float) -> QLoRAFinetuneStatus:
    """Drop the avoided nodes whose time is over. One without a time (of an older operator) gets a whole one."""
    whole = now + timedelta(seconds=avoid_seconds)
    until = {node: status.avoided_until.get(node, whole) for node in status.avoided_nodes}
    until = {node: moment for node, moment in until.items() if moment > now}
    return status.model_copy(update={"avoided_nodes": [*until], "avoided_until": until})


def _avoid(status: QLoRAFinetuneStatus, verdict: Verdict, until: datetime) -> QLoRAFinetuneStatus:
    """Nodes to keep away from if others are free: silent, corrupting, too small, or at fault again and again.

    Every further fault of an avoided node starts its time anew.
    """
    node, reason = verdict.ending.node_name, verdict.ending.reason
    faults = sum(record.node_name == node for record in status.failures)
    again = verdict.effect == "Count" and (node in status.avoided_nodes or faults >= NODE_FAULT_LIMIT)
    if not node or not (reason in _AVOIDED_AT_ONCE or again):
        return status
    nodes = [*(known for known in status.avoided_nodes if known != node), node][-_KEPT_RECORDS:]
    times = {**status.avoided_until, node: until}
    kept = {known: times[known] for known in nodes if known in times}
    return status.model_copy(update={"avoided_nodes": nodes, "avoided_until": kept})
