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
_MISSING_SECRET = re.compile(r'secret "([^"]+)" not found')


def parse_pod(raw: Json, now: datetime, mount_messages: tuple[str, ...] = ()) -> Pod:
    """`mount_messages`: what the kubelet's events say about volumes of this pod that it could not mount."""
    metadata, spec, status = raw["metadata"], raw.get("spec", {}), raw.get("status", {})
    labels = metadata.get("labels", {})
    container = _container(status)
    exit_ = parse_exit(container)
    disruption: Json = next((c for c in status.get("conditions", []) if c["type"] == "DisruptionTarget"), {})
    state = container.get("state", {})
    return Pod(
        name=metadata["name"],
        uid=metadata["uid"],
        index=int(labels.get(names.LABEL_INDEX, -1)),
        incarnation=int(labels.get(names.LABEL_INCARNATION, -1)),
        phase=status.get("phase", "Pending"),
        age=_seconds_since(metadata["creationTimestamp"], now),
        deleting="deletionTimestamp" in metadata,
        overdue=_seconds_since(metadata["deletionTimestamp"], now) if "deletionTimestamp" in metadata else 0.0,
        node=spec.get("nodeName", ""),
        ended=exit_ is not None and "running" not in state,
        restarts=container.get("restartCount", 0) + ("terminated" in state),
        exit=exit_,
        reason=status.get("reason", "") or disruption.get("reason", ""),
        trouble=_trouble(metadata, status, state.get("waiting", {}), mount_messages),
    )


def is_mounting(raw: Json) -> bool:
    """Bound to a node, and its container is not even created: a volume may be missing."""
    status = raw.get("status", {})
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


def _trouble(metadata: Json, status: Json, waiting: Json, mount_messages: tuple[str, ...]) -> Trouble | None:
    if waiting.get("reason") in IMAGE_PROBLEMS:
        what = f"{metadata['name']}: {waiting['reason']}: {waiting.get('message', '')}"
        advice = "check spec.image, its registry and imagePullSecrets"
        return Trouble(Reason.IMAGE_PULL_FAILED, f"{what}; {advice}")
    secrets = {match[1] for message in mount_messages if (match := _MISSING_SECRET.search(message))}
    if secrets:
        listed = ", ".join(sorted(secrets))
        where = f"namespace {metadata['namespace']}"
        advice = "create it with the keys that spec's secretRef describes; the pods then start by themselves"
        return Trouble(Reason.MISSING_SECRET, f"Secret {listed} does not exist in {where}: {advice}")
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            advice = "add nodes, or lower resourcesPerNode or elasticPolicy"
            return Trouble(Reason.UNSCHEDULABLE, f"{metadata['name']}: {condition.get('message', '')}; {advice}")
    return None
