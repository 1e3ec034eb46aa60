"""The status of `QLoRAFinetune`: written by the operator alone, once a pass; all that it must remember stands here."""

from enum import StrEnum
from typing import Literal

from pydantic import Field

from qlora_api.base import ApiModel, Measure, Time


class State(StrEnum):
    """One word for `kubectl get`; derived from the conditions."""

    PENDING = "Pending"  # accepted, pods not yet there
    STARTING = "Starting"  # pods there, warming up
    RUNNING = "Running"
    WAITING = "Waiting"  # fewer than minNodes; snapshots are kept
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class Condition(ApiModel):
    """As `metav1.Condition`."""

    type: str = Field(max_length=316)
    status: Literal["True", "False", "Unknown"]
    reason: str = Field(max_length=1024)
    message: str = Field("", max_length=32768)
    last_transition_time: Time
    observed_generation: int = 0


class Progress(ApiModel):
    """How far the run is; the same type on the wire and in status."""

    step: int = Field(0, ge=0, description="Optimizer steps done.")
    total_steps: int = Field(0, ge=0)
    loss: Measure | None = Field(None, description="Training loss of the last step, nats a token.")
    eval_loss: Measure | None = Field(None, description="Newest evaluation loss, nats a token.")
    learning_rate: Measure | None = None
    grad_norm: Measure | None = None
    tokens: int = Field(0, ge=0, description="Tokens trained on so far, padding not counted.")
    tokens_per_second: Measure | None = Field(None, description="Over all nodes.")
    eta_seconds: int | None = Field(None, ge=0)


class Nodes(ApiModel):
    """Counts of pods."""

    desired: int = 0
    ready: int = Field(0, description="Warm and answering.")
    active: int = Field(0, description="Members of the current generation.")


class Member(ApiModel):
    """One pod of a generation; its index in the list is its node rank."""

    pod_uid: str
    pod_name: str
    address: str = Field(description="IP address that its peers reach.")
    node_name: str = ""


class Slot(ApiModel):
    """One of the run's pod places. The pod's name is RUN-INDEX-INCARNATION."""

    index: int = Field(ge=0)
    incarnation: int = Field(0, ge=0, description="How often the pod of this place was replaced.")
    restarts: int = Field(0, ge=0, description="Container restarts of this incarnation that have been judged.")


class Restarts(ApiModel):
    """Why members were lost; only failures count against failurePolicy."""

    disruptions: int = 0
    failures: int = 0
    by_reason: dict[str, int] = {}


class FailureRecord(ApiModel):
    """One failure that counts, kept while it is inside the window."""

    time: Time
    reason: str
    step: int = 0
    node_name: str = ""


class LastFailure(ApiModel):
    """What a person wants to know first when something broke."""

    time: Time
    reason: str
    message: str = Field("", max_length=4096, description="What happened and what to do.")
    pod_name: str = ""
    node_name: str = ""
    rank: int | None = None
    exit_code: int | None = None
    step: int = 0
    log_tail: str = Field("", max_length=4096)


class CheckpointStatus(ApiModel):
    """The newest complete durable checkpoint."""

    step: int = Field(ge=0)
    uri: str
    time: Time


class Artifacts(ApiModel):
    """What the run left in the bucket."""

    adapter_uri: str
    manifest_uri: str
    adapter_bytes: int = Field(ge=0)
    adapter_sha256: str
    merged_uri: str | None = None
    eval_loss_before: float | None = None
    eval_loss_after: float | None = None


class QLoRAFinetuneStatus(ApiModel):
    """Everything that the operator must remember about a run."""

    observed_generation: int = 0
    state: State = State.PENDING
    conditions: list[Condition] = []
    start_time: Time | None = None
    completion_time: Time | None = None
    progress: Progress = Progress()
    progress_time: Time | None = Field(None, description="When the step last advanced.")
    nodes: Nodes = Nodes()
    nodes_summary: str = Field("", description="active/desired, for kubectl get.")
    generation: int = Field(0, ge=0, description="Membership generation: rises by one with every change of members.")
    members: list[Member] = []
    slots: list[Slot] = []
    restarts: Restarts = Restarts()
    failures: list[FailureRecord] = Field([], max_length=64)
    avoided_nodes: list[str] = Field([], max_length=64, description="Nodes with repeated faults.")
    last_failure: LastFailure | None = None
    checkpoint: CheckpointStatus | None = None
    artifacts: Artifacts | None = None
