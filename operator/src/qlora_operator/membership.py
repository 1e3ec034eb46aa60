"""Two-phase membership: who trains together, under which generation.

The rules, in one place:

* A generation is a numbered, ordered list of pods. Numbers only rise, by one; the list of a number never changes.
* A change has two phases. `prepare` = generation + 1 calls every live member to the rendezvous; the generation is
  published once all of them stand there (READY), so a dead member that is not yet known to be dead is never published.
* Wanted is a change when a member is lost or leaving, has left its workers (READY or FAILED under this generation),
  hangs, or when a fully warm newcomer stands READY and everybody of this generation already trains.
* Once wanted, a change stays wanted until it is published: agents have stopped their workers for it.
* Survivors keep their order, newcomers go last: the first member hosts the store and is a source of the state.
* A report that was under way when a generation was published cannot undo it: READY under an older generation is a
  member on its way in, unless its agent began anew or the way takes too long. A report that knows a newer generation
  means that our status is stale: do nothing.
* Publishing waits `settle_seconds` after the first phase began, for reports to be fresh, for minNodes, and at a fresh
  start (nobody carries on) up to `start_wait_seconds` for the nodes that are still expected.

Pure: ages come in, a plan goes out.
"""

from dataclasses import dataclass
from enum import StrEnum

from qlora_api.run import AgentState
from qlora_api.status import Member

FRESH_CHECK_SECONDS = 0.2  # a mere sign of life wakes nobody


@dataclass(frozen=True)
class Candidate:
    """A live agent on a live pod of a current place that is neither warming up nor leaving."""

    member: Member
    index: int
    state: AgentState
    joined: int = 0  # newest generation that it joined; 0 after a restart of its container
    known: int = 0  # newest generation that it knew of when it reported
    highest: int = 0  # newest that it ever joined: above `joined` when the agent itself began anew
    stalled: bool = False  # this generation was published a while ago, and it has not come in
    fresh: bool = True  # it reported a moment ago, its connection stands
    trains: bool = True  # its workers are past their start and before the run's end

    @property
    def standing(self) -> bool:
        return self.state == AgentState.READY


@dataclass(frozen=True)
class View:
    """What a plan depends on."""

    generation: int
    members: tuple[Member, ...]
    candidates: tuple[Candidate, ...]
    min_nodes: int
    max_nodes: int
    expected: int  # places whose pods may yet come
    prepare_age: float | None = None  # seconds since the change under way was announced
    longest_standing: float = 0.0  # seconds that the first of those who stand has been standing
    hung: bool = False
    settle_seconds: float = 0.3
    start_wait_seconds: float = 10.0


class Phase(StrEnum):
    """Where a plan stands."""

    STEADY = "steady"
    STALE = "stale"
    PREPARING = "preparing"
    PUBLISHED = "published"


@dataclass(frozen=True)
class Plan:
    """The membership from now on."""

    generation: int
    members: tuple[Member, ...]
    prepare: int
    phase: Phase
    too_few: bool = False  # fewer than minNodes stand or run
    late: tuple[str, ...] = ()  # uids of live members that do not stand yet
    recheck: float | None = None  # seconds after which time alone may change the plan


def plan(view: View) -> Plan:
    """The next membership; the same view gives the same plan."""
    if any(candidate.known > view.generation for candidate in view.candidates):
        return Plan(view.generation, view.members, view.generation, Phase.STALE)
    if not is_change_wanted(view):
        too_few = not view.members
        return Plan(view.generation, view.members, view.generation, Phase.STEADY, too_few)
    late = tuple(c.member.pod_uid for c in view.candidates if _is_member(view, c) and not c.standing)
    standing = tuple(c for c in view.candidates if c.standing)
    too_few = len(standing) + len(late) < view.min_nodes
    wait = _seconds_to_wait(view, standing)
    fresh = all(candidate.fresh for candidate in standing)
    if late or wait > 0 or len(standing) < view.min_nodes or not fresh:
        recheck = None if late else wait if wait > 0 else None if fresh else FRESH_CHECK_SECONDS
        return Plan(view.generation, view.members, view.generation + 1, Phase.PREPARING, too_few, late, recheck)
    following = view.generation + 1
    return Plan(following, order(view, standing), following, Phase.PUBLISHED)


def is_change_wanted(view: View) -> bool:
    """Whether the members of this generation must become others, or begin anew."""
    present = {candidate.member.pod_uid for candidate in view.candidates}
    lost = any(member.pod_uid not in present for member in view.members)
    return lost or view.hung or view.prepare_age is not None or _anyone_left(view) or _can_grow(view)


def order(view: View, standing: tuple[Candidate, ...]) -> tuple[Member, ...]:
    """Survivors in their old order, then newcomers by place, at most maxNodes."""
    rank = {member.pod_uid: rank for rank, member in enumerate(view.members)}

    def seniority(candidate: Candidate) -> tuple[bool, int]:
        old = rank.get(candidate.member.pod_uid)
        survivor = old is not None and candidate.joined > 0
        return (not survivor, old if survivor and old is not None else candidate.index)

    return tuple(candidate.member for candidate in sorted(standing, key=seniority)[: view.max_nodes])


def _is_member(view: View, candidate: Candidate) -> bool:
    return any(member.pod_uid == candidate.member.pod_uid for member in view.members)


def _anyone_left(view: View) -> bool:
    """A member gave up the workers of this very generation."""

    def left(candidate: Candidate) -> bool:
        was_in = view.generation in (candidate.joined, candidate.highest)
        if candidate.state == AgentState.FAILED:
            return was_in or candidate.known == view.generation
        return candidate.standing and (was_in or candidate.stalled)

    return any(left(candidate) for candidate in view.candidates if _is_member(view, candidate))


def _can_grow(view: View) -> bool:
    """A newcomer stands and all members train: growing does not disturb a start or the end of the run."""
    members = [candidate for candidate in view.candidates if _is_member(view, candidate)]
    settled = all(c.state == AgentState.RUNNING and c.joined == view.generation and c.trains for c in members)
    newcomer = any(c.standing and not _is_member(view, c) for c in view.candidates)
    return newcomer and settled and len(members) < view.max_nodes


def _seconds_to_wait(view: View, standing: tuple[Candidate, ...]) -> float:
    """Seconds until settled and, at a fresh start, until the expected nodes had their time."""
    wait = view.settle_seconds - (view.prepare_age or 0.0)
    fresh_start = all(candidate.joined == 0 for candidate in standing)
    if fresh_start and len(standing) < min(view.expected, view.max_nodes):
        wait = max(wait, view.start_wait_seconds - view.longest_standing)
    return wait
