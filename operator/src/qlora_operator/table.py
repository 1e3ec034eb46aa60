"""What the coordinator remembers of each run: the newest report of every agent, with clocks, and the answer they get.

Nothing here outlives the process, and nothing needs to: the answer comes from status, the reports from the agents' next
calls, and a change that an earlier process was preparing is recognized by what the agents already know. Clock readings
are arguments (monotonic seconds), so that tests turn the clock.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from statistics import median

from qlora_api.run import Command, Membership, Report, Termination
from qlora_operator.state import Agent, Heard, PodIdentity

_FORGET_SECONDS = 60.0
_STEPS_KEPT = 64


@dataclass
class _Entry:
    """One agent."""

    pod: PodIdentity
    report: Report
    received: float
    since: float  # in this state and generation
    highest: int = 0
    dropped: float | None = None
    failure: Termination | None = None
    failure_generation: int = 0


@dataclass
class RunTable:
    """One run's agents."""

    known_since: float
    answer: Membership | None = None
    entries: dict[str, _Entry] = field(default_factory=dict)
    heard_since: float | None = None
    generation_since: float = 0.0
    prepare_since: float | None = None
    step: int = -1
    step_since: float = 0.0
    stepped_generation: int = 0
    activity_since: float | None = None
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_STEPS_KEPT))

    def receive(self, pod: PodIdentity, report: Report, now: float) -> bool:
        """Take a report; True when it brings more than a sign of life."""
        self.heard_since = now if self.heard_since is None else self.heard_since
        old = self.entries.get(pod.pod_uid)
        entry = _Entry(pod, report, now, now, report.generation)
        if old is not None:
            same = (old.report.state, old.report.generation) == (report.state, report.generation)
            entry.since = old.since if same else now
            entry.highest = max(old.highest, report.generation)
            if report.activity not in (None, old.report.activity):
                self.activity_since = now
            if report.generation <= old.failure_generation or report.generation == 0:
                entry.failure, entry.failure_generation = old.failure, old.failure_generation
        if report.termination is not None:
            entry.failure, entry.failure_generation = report.termination, report.generation
        self.entries[pod.pod_uid] = entry
        self._time_steps(report, now)
        if self.answer is not None and report.known_prepare > self.answer.generation and self.prepare_since is None:
            self.prepare_since = now
        return old is None or _is_news(old, report)

    def drop(self, pod: PodIdentity, now: float) -> None:
        """A connection that held a call of this agent broke. Its next report takes that back."""
        entry = self.entries.get(pod.pod_uid)
        if entry is not None:
            entry.dropped = now

    def publish(self, answer: Membership, now: float) -> bool:
        """What agents are told from now on; True when that is news."""
        old = self.answer
        if old is None or answer.generation > old.generation:
            self.generation_since, self.prepare_since = now, None
        if answer.prepare > answer.generation:
            self.prepare_since = now if self.prepare_since is None else self.prepare_since
        else:
            self.prepare_since = None
        self.answer = answer
        return answer != old

    def keep(self, pod_uids: Iterable[str], now: float) -> None:
        """Forget agents whose pods are gone and that have long been silent."""
        kept = set(pod_uids)
        gone = [uid for uid, e in self.entries.items() if uid not in kept and now - e.received > _FORGET_SECONDS]
        for uid in gone:
            del self.entries[uid]

    def heard(self, now: float) -> Heard:
        """The table as the core sees it."""
        return Heard(
            agents=tuple(_agent(self.entries[uid], now) for uid in sorted(self.entries)),
            prepare_age=None if self.prepare_since is None else now - self.prepare_since,
            generation_age=now - self.generation_since,
            heard_age=0.0 if self.heard_since is None else now - self.heard_since,
            listening_age=now - self.known_since,
            step_age=now - self.step_since,
            activity_age=inf if self.activity_since is None else now - self.activity_since,
            stepped_generation=self.stepped_generation,
            median_step=median(self.step_seconds) if self.step_seconds else None,
        )

    def _time_steps(self, report: Report, now: float) -> None:
        step = report.progress.step if report.progress is not None else -1
        if step > self.step >= 0:
            self.step_seconds.append((now - self.step_since) / (step - self.step))
            self.stepped_generation = max(self.stepped_generation, report.generation)
        if step > self.step:
            self.step, self.step_since = step, now


def is_newer(answer: Membership, report: Report) -> bool:
    """Whether the answer tells this agent something that it does not know."""
    if answer.generation > report.known_generation or answer.command != report.known_command:
        return True
    return answer.prepare > report.known_prepare


def stop_answer() -> Membership:
    """What an agent is told whose run is gone."""
    return Membership(command=Command.STOP)


def _is_news(old: _Entry, report: Report) -> bool:
    before = old.report
    if old.dropped is not None:
        return True
    return (before.state, before.generation, before.termination, before.artifacts, before.known_generation) != (
        report.state,
        report.generation,
        report.termination,
        report.artifacts,
        report.known_generation,
    )


def _agent(entry: _Entry, now: float) -> Agent:
    return Agent(
        pod_name=entry.pod.pod_name,
        pod_uid=entry.pod.pod_uid,
        report=entry.report,
        age=now - entry.received,
        dropped=None if entry.dropped is None else now - entry.dropped,
        state_age=now - entry.since,
        failure=entry.failure,
        failure_generation=entry.failure_generation,
        highest=entry.highest,
    )
