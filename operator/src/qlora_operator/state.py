"""The frozen types that the core speaks: what was observed of one run, and what is to be done about it.

Rules: no clock and no I/O; ages are seconds that the edges computed from their clocks; a `Decision` is data that the
edges carry out in the order status, membership, actions, events.
"""

from dataclasses import dataclass, field
from datetime import datetime
from math import inf
from typing import Any, Literal, NamedTuple

from qlora_api.names import Reason
from qlora_api.run import Membership, Report, RunIdentity, Termination
from qlora_api.status import QLoRAFinetuneStatus
from qlora_api.types import QLoRAFinetuneSpec

Manifest = dict[str, Any]


class Key(NamedTuple):
    """Where a run is found."""

    namespace: str
    name: str


@dataclass(frozen=True)
class PodIdentity:
    """Whose token it is, in the API server's words."""

    namespace: str
    account: str
    pod_name: str
    pod_uid: str


@dataclass(frozen=True)
class Run:
    """The resource as far as the core cares."""

    identity: RunIdentity
    spec: QLoRAFinetuneSpec
    created: datetime
    generation: int = 1  # metadata.generation, of the spec
    priority_labels: tuple[tuple[str, str], ...] = ()  # labels of the resource that its pods carry on


@dataclass(frozen=True)
class Exit:
    """How a pod's container ended the last time."""

    code: int
    reason: str = ""  # the runtime's word: Error, OOMKilled, ContainerStatusUnknown
    termination: Termination | None = None  # its termination message, when it is one of ours
    message: str = ""  # its termination message, when it is not


@dataclass(frozen=True)
class Trouble:
    """Why a pod does not start, in the words of conditions."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class Pod:
    """One pod of the run, of whatever incarnation."""

    name: str
    uid: str
    index: int
    incarnation: int
    phase: Literal["Pending", "Running", "Succeeded", "Failed", "Unknown"] = "Pending"
    age: float = 0.0
    deleting: bool = False
    overdue: float = 0.0  # since it should have been gone
    node: str = ""
    ended: bool = False  # its container is not running now though it was
    restarts: int = 0  # how often its container ended
    exit: Exit | None = None  # the newest of those ends
    reason: str = ""  # status.reason or the reason of DisruptionTarget: Evicted, DeletionByTaintManager, ...
    trouble: Trouble | None = None

    @property
    def live(self) -> bool:
        """Still holds its place: neither finished nor on its way out."""
        return self.phase not in ("Succeeded", "Failed") and not self.deleting


@dataclass(frozen=True)
class Agent:
    """The newest report of a pod's agent, and how old things are."""

    pod_name: str
    pod_uid: str
    report: Report
    age: float = 0.0  # since the report
    dropped: float | None = None  # since its connection broke; None: it did not, or it reported since
    state_age: float = 0.0  # in this state and generation
    failure: Termination | None = None  # newest termination reported
    failure_generation: int = 0  # the generation that it ended
    highest: int = 0  # newest generation that any agent process of this pod said it joined


@dataclass(frozen=True)
class Refusal:
    """The API server refused an action of the pass before."""

    action: str
    status: int
    message: str


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the API server knows of a run."""

    run: Run
    status: QLoRAFinetuneStatus
    pods: tuple[Pod, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What the coordinator knows of a run from its agents."""

    agents: tuple[Agent, ...] = ()
    prepare_age: float | None = None  # since this process announced the change under way
    generation_age: float = 0.0  # since this process has known the generation
    heard_age: float = 0.0  # since this process first heard any agent of the run; 0: never
    listening_age: float = 0.0  # since this process has known the run
    step_age: float = 0.0  # since this process saw the step advance
    activity_age: float = inf  # since it saw that any worker did something; inf: they do not tell
    stepped_generation: int = 0  # under which the newest step was done
    median_step: float | None = None  # seconds a step


@dataclass(frozen=True, kw_only=True)
class Observed(Seen, Heard):
    """All that a decision depends on."""

    now: datetime
    refusals: tuple[Refusal, ...] = ()


# Actions, in the order in which they are carried out.


@dataclass(frozen=True)
class ApplyObject:
    """Server-side apply of a whole object with our field manager."""

    body: Manifest = field(hash=False)


@dataclass(frozen=True)
class CreatePod:
    """Create a pod of a deterministic name; an existing one is success."""

    name: str
    body: Manifest = field(hash=False, compare=False)


@dataclass(frozen=True)
class DeletePod:
    """Delete this very pod (uid precondition); by force: without the word of its kubelet."""

    name: str
    uid: str
    force: bool = False


@dataclass(frozen=True)
class DeleteRun:
    """Delete the resource itself: its time to live is over."""

    uid: str


Action = ApplyObject | CreatePod | DeletePod | DeleteRun


@dataclass(frozen=True)
class Event:
    """A Kubernetes event about the run."""

    reason: str
    message: str
    kind: Literal["Normal", "Warning"] = "Normal"


@dataclass(frozen=True)
class Decision:
    """What a pass wants."""

    status: QLoRAFinetuneStatus
    membership: Membership
    actions: tuple[Action, ...] = ()
    events: tuple[Event, ...] = ()
    requeue_after: float = 30.0
