"""A pod as the API server describes it -> `state.Pod`. Pure."""

import re
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from qlora_api import names
from qlora_api.names import Reason
from qlora_api.run import Termination
from qlora_operator.state import Exit, Pod, Trouble

Json = dict[str, Any]
IMAGE_PROBLEMS = (
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ImageInspectError",
    "RegistryUnavailable",
)
_MOUNT_PATIENCE_SECONDS = 30.0  # a first attempt may fail for a cache that is not filled yet, or a slow attachment
_MISSING_SECRET = re.compile(r'secret "([^"]+)" not found')


def parse_pod(raw: Json, now: datetime, mount_messages: tuple[str, ...] = ()) -> Pod:
    """`mount_messages`: what the kubelet says of volumes of this pod that it could not mount, oldest first."""
    metadata, spec, status = raw["metadata"], raw.get("spec", {}), raw.get("status", {})
    labels = metadata.get("labels", {})
    container = _container(status)
    exit_ = parse_exit(container)
    disruption = _condition(status, "DisruptionTarget")
    state = container.get("state", {})
    age = _seconds_since(metadata["creationTimestamp"], now)
    return Pod(
        name=metadata["name"],
        uid=metadata["uid"],
        index=int(labels.get(names.LABEL_INDEX, -1)),
        incarnation=int(labels.get(names.LABEL_INCARNATION, -1)),
        phase=status.get("phase", "Pending"),
        age=age,
        deleting="deletionTimestamp" in metadata,
        overdue=_seconds_since(metadata["deletionTimestamp"], now) if "deletionTimestamp" in metadata else 0.0,
        node=spec.get("nodeName", ""),
        ended=exit_ is not None and "running" not in state,
        restarts=container.get("restartCount", 0) + ("terminated" in state),
        exit=exit_,
        reason=status.get("reason", "") or disruption.get("reason", ""),
        trouble=_start_trouble(metadata, status, state.get("waiting", {}))
        or _mount_trouble(metadata, mount_messages, age > _MOUNT_PATIENCE_SECONDS),
    )


def is_mounting(raw: Json) -> bool:
    """Bound to a node, and not even its sandbox is there, which comes after the volumes: one may be missing."""
    status = raw.get("status", {})
    if _condition(status, "PodReadyToStartContainers").get("status") == "True":
        return False  # it pulls its image
    waiting = _container(status).get("state", {}).get("waiting", {})
    bound = bool(raw.get("spec", {}).get("nodeName")) and status.get("phase", "Pending") == "Pending"
    return bound and waiting.get("reason", "ContainerCreating") == "ContainerCreating"


def parse_exit(container: Json) -> Exit | None:
    """How the container ended the last time."""
    ended = container.get("state", {}).get("terminated") or container.get("lastState", {}).get("terminated")
    if not ended:
        return None
    message = ended.get("message", "")
    try:
        termination = Termination.model_validate_json(message)
    except ValidationError:
        termination = None
    return Exit(ended.get("exitCode", 0), ended.get("reason", ""), termination, "" if termination else message)


def _seconds_since(moment: str, now: datetime) -> float:
    return (now - datetime.fromisoformat(moment)).total_seconds()


def _container(status: Json) -> Json:
    found = (item for item in status.get("containerStatuses", []) if item["name"] == names.CONTAINER)
    return next(found, {})


def _condition(status: Json, kind: str) -> Json:
    found = (condition for condition in status.get("conditions", []) if condition["type"] == kind)
    return next(found, {})


def _start_trouble(metadata: Json, status: Json, waiting: Json) -> Trouble | None:
    """No image, or no node with room."""
    if waiting.get("reason") in IMAGE_PROBLEMS:
        what = f"{metadata['name']}: {waiting['reason']}: {waiting.get('message', '')}"
        advice = "check spec.image, its registry and imagePullSecrets"
        return Trouble(Reason.IMAGE_PULL_FAILED, f"{what}; {advice}")
    scheduled = _condition(status, "PodScheduled")
    if scheduled.get("status") == "False":
        advice = "add nodes, or lower resourcesPerNode or elasticPolicy"
        return Trouble(Reason.UNSCHEDULABLE, f"{metadata['name']}: {scheduled.get('message', '')}; {advice}")
    return None


def _mount_trouble(metadata: Json, messages: tuple[str, ...], told_long_enough: bool) -> Trouble | None:
    """A Secret that is not there, or whatever else the kubelet says that it goes on trying."""
    secrets = {match[1] for message in messages if (match := _MISSING_SECRET.search(message))}
    if secrets:
        listed = ", ".join(sorted(secrets))
        where = f"namespace {metadata['namespace']}"
        advice = "create it with the keys that spec's secretRef describes; the pods then start by themselves"
        return Trouble(Reason.MISSING_SECRET, f"Secret {listed} does not exist in {where}: {advice}")
    if messages and told_long_enough:
        advice = "check its volumes and claims and resourcesPerNode.limits.memory; the node goes on trying"
        return Trouble(Reason.MOUNT_FAILED, f"{metadata['name']}: {messages[-1].rstrip('. ')}; {advice}")
    return None
