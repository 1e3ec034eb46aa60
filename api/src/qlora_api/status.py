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

    type: str = Field(max_length=316, description="Running, Suspended, Complete or Failed.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    reason: str = Field(max_length=1024, description="Why, in one CamelCase word.")
    message: str = Field("", max_length=32768, description="Why, in a sentence that says what to do.")
    last_transition_time: Time = Field(description="When status last changed.")
    observed_generation: int = Field(0, description="metadata.generation that it speaks of.")


class Progress(ApiModel):
    """How far the run is; the same type on the wire and in status."""

    step: int = Field(0, ge=0, description="Optimizer steps done.")
    total_steps: int = Field(0, ge=0, description="Optimizer steps in all.")
    loss: Measure | None = Field(None, description="Training loss of the last step, nats a token.")
    eval_loss: Measure | None = Field(None, description="Newest evaluation loss, nats a token.")
    learning_rate: Measure | None = Field(None, description="Of the last step.")
    grad_norm: Measure | None = Field(None, description="Global norm of the gradient before clipping.")
    tokens: int = Field(0, ge=0, description="Tokens trained on so far, padding not counted.")
    tokens_per_second: Measure | None = Field(
        None, description="Over all nodes; absent while the run waits, is suspended or has failed."
    )
    eta_seconds: int | None = Field(None, ge=0, description="Seconds to go at the present speed; absent like it.")


class Nodes(ApiModel):
    """Counts of pods."""

    desired: int = Field(0, description="maxNodes; 0 while the run is suspended or over.")
    ready: int = Field(0, description="Warm and answering.")
    active: int = Field(0, description="Members of the current generation.")


class Member(ApiModel):
    """One pod of a generation; its index in the list is its node rank."""

    pod_uid: str = Field(description="uid of its pod.")
    pod_name: str = Field(description="Name of its pod.")
    address: str = Field(description="IP address that its peers reach.")
    node_name: str = Field("", description="Node that its pod runs on.")


class Slot(ApiModel):
    """One of the run's pod places. The pod's name is RUN-INDEX-INCARNATION."""

    index: int = Field(ge=0, description="Number of the place, from 0.")
    incarnation: int = Field(0, ge=0, description="How often the pod of this place was replaced.")
    restarts: int = Field(0, ge=0, description="Container restarts of this incarnation that have been judged.")


class Restarts(ApiModel):
    """Why members were lost; only failures count against failurePolicy."""

    disruptions: int = Field(0, description="Members lost without fault of the run: free.")
    failures: int = Field(0, description="Failures that counted, inside the window or not.")
    by_reason: dict[str, int] = Field({}, description="Both by their reason.")


class FailureRecord(ApiModel):
    """One failure that counts, kept while it is inside the window."""

    time: Time = Field(description="When it was judged.")
    reason: str = Field(description="Its reason.")
    step: int = Field(0, description="Optimizer steps done until then.")
    node_name: str = Field("", description="Node that it happened on.")


class LastFailure(ApiModel):
    """What a person wants to know first when something broke."""

    time: Time = Field(description="When it was judged.")
    reason: str = Field(description="Its reason.")
    message: str = Field("", max_length=4096, description="What happened and what to do.")
    pod_name: str = Field("", description="Pod that it happened in.")
    node_name: str = Field("", description="Node that it happened on.")
    rank: int | None = Field(None, description="Rank of the worker process.")
    exit_code: int | None = Field(None, description="The worker's or the container's exit code.")
    step: int = Field(0, description="Optimizer steps done until then.")
    log_tail: str = Field("", max_length=4096, description="The last lines that it printed.")


class Straggler(ApiModel):
    """A pod that all others wait for in every step."""

    pod_name: str = Field(description="The slow pod.")
    node_name: str = Field("", description="Node that it runs on.")
    ratio: Measure = Field(description="How often its part of a step takes the median of the others' parts.")
    work_seconds: Measure = Field(description="Median seconds that it works for a step, before it waits for others.")
    since: Time = Field(description="When it was first seen to be slow.")


class CheckpointStatus(ApiModel):
    """The newest complete durable checkpoint."""

    step: int = Field(ge=0, description="Optimizer steps that it holds.")
    uri: str = Field(description="Its folder in the bucket.")
    time: Time = Field(description="When it was started.")


class Artifacts(ApiModel):
    """What the run left in the bucket."""

    adapter_uri: str = Field(description="Folder that peft loads.")
    manifest_uri: str = Field(description="Names, sizes and sha256 of every file, and where they come from.")
    adapter_bytes: int = Field(ge=0, description="Size of all files of the adapter.")
    adapter_sha256: str = Field(description="Digest of adapter_model.safetensors.")
    merged_uri: str | None = Field(None, description="Folder of the merged model, when output.merge is set.")
    eval_loss_before: float | None = Field(None, description="Evaluation loss of the base, nats a token.")
    eval_loss_after: float | None = Field(None, description="Evaluation loss with the adapter, nats a token.")


class QLoRAFinetuneStatus(ApiModel):
    """Everything that the operator must remember about a run."""

    observed_generation: int = Field(0, description="metadata.generation that this status speaks of.")
    state: State = State.PENDING
    conditions: list[Condition] = Field(
        [], description="Running, Suspended, Complete, Failed; absent until they happen."
    )
    start_time: Time | None = Field(None, description="When the operator first saw the run.")
    completion_time: Time | None = Field(None, description="When it was complete or failed.")
    progress: Progress = Progress()
    progress_time: Time | None = Field(None, description="When the step last advanced.")
    nodes: Nodes = Nodes()
    nodes_summary: str = Field("", description="active/desired, for kubectl get.")
    generation: int = Field(0, ge=0, description="Membership generation: rises by one with every change of members.")
    members: list[Member] = Field([], description="The pods of this generation, by node rank.")
    slots: list[Slot] = Field([], description="The run's pod places and how often the pod of each was replaced.")
    restarts: Restarts = Restarts()
    failures: list[FailureRecord] = Field([], max_length=64, description="Failures inside failurePolicy's window.")
    avoided_nodes: list[str] = Field([], max_length=64, description="Nodes at fault: new pods avoid them if they can.")
    avoided_until: dict[str, Time] = Field({}, description="When each avoided node is forgiven if it keeps quiet.")
    stragglers: list[Straggler] = Field([], description="Pods that hold up the others; told, never acted on.")
    last_failure: LastFailure | None = None
    checkpoint: CheckpointStatus | None = None
    artifacts: Artifacts | None = None
