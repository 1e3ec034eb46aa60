"""The cluster's side of a pass: observe a run, write its status, carry out actions, tell events, review tokens.

Rules: reads are fresh (no cache), the status is replaced under the resourceVersion that was read, so of two operators
only one can publish a generation; a pod that exists, or one that is gone, is success.
"""

import logging
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from pydantic import ValidationError

from qlora_api import names
from qlora_api.run import TOKEN_AUDIENCE, RunIdentity
from qlora_api.status import QLoRAFinetuneStatus
from qlora_api.types import QLoRAFinetuneSpec
from qlora_operator.kube import APPLY, ApiError, Json, Kube
from qlora_operator.podstatus import is_mounting, parse_pod
from qlora_operator.state import (
    Action,
    ApplyObject,
    CreatePod,
    DeletePod,
    DeleteRun,
    Event,
    Key,
    PodIdentity,
    Refusal,
    Run,
    Seen,
)

log = logging.getLogger(__name__)
PASSED_ON_LABELS = ("kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class")
_EVENTS_AFTER_SECONDS = 3.0  # younger pods' events are not asked for
_RUNS = f"/apis/{names.GROUP}/{names.VERSION}"
_REFUSALS = (400, 403, 422)
_KINDS = {"ConfigMap": "configmaps", "ServiceAccount": "serviceaccounts"}
_POD_NAME, _POD_UID = "authentication.kubernetes.io/pod-name", "authentication.kubernetes.io/pod-uid"


@dataclass(frozen=True)
class Sight:
    """A run as read: for the core, and raw for the status write that follows."""

    seen: Seen
    raw: Json


class Cluster:
    """I/O about runs."""

    def __init__(self, kube: Kube) -> None:
        self._kube = kube

    async def list_runs(self, namespaces: Iterable[str] = ()) -> list[Key]:
        """Every run of these namespaces (none given: of all)."""
        places = [f"{_RUNS}/namespaces/{namespace}" for namespace in namespaces] or [_RUNS]
        lists = [await self._kube.request("GET", f"{place}/{names.PLURAL}") for place in places]
        return [Key(i["metadata"]["namespace"], i["metadata"]["name"]) for found in lists for i in found["items"]]

    async def observe(self, key: Key, now: datetime) -> Sight | None:
        """The run with its pods, or None when it is gone or going. Raises ValueError for a spec we cannot read."""
        try:
            raw = await self._kube.request("GET", _run_path(key))
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        if "deletionTimestamp" in raw["metadata"]:
            return None  # the garbage collector takes what the run owns
        run = parse_run(raw)
        status = QLoRAFinetuneStatus.model_validate(raw.get("status") or {})
        query = {"labelSelector": f"{names.LABEL_RUN}={key.name}"}
        found = await self._kube.request("GET", f"/api/v1/namespaces/{key.namespace}/pods", query=query)
        own = [pod for pod in found["items"] if _is_owned_by(pod, run.identity.uid)]
        pods = [parse_pod(pod, now, await self._mount_messages(pod, now)) for pod in own]
        return Sight(Seen(run=run, status=status, pods=tuple(sorted(pods, key=lambda pod: pod.name))), raw)

    async def _mount_messages(self, pod: Json, now: datetime) -> tuple[str, ...]:
        """The kubelet tells in events only what it cannot mount; oldest first."""
        age = (now - datetime.fromisoformat(pod["metadata"]["creationTimestamp"])).total_seconds()
        if age < _EVENTS_AFTER_SECONDS or not is_mounting(pod):
            return ()
        path = f"/api/v1/namespaces/{pod['metadata']['namespace']}/events"
        selector = f"involvedObject.uid={pod['metadata']['uid']},reason=FailedMount"
        found = await self._kube.request("GET", path, query={"fieldSelector": selector})
        told = sorted(
            found["items"], key=lambda event: event.get("lastTimestamp") or event["metadata"]["creationTimestamp"]
        )
        return tuple(event.get("message", "") for event in told)

    async def write_status(self, raw: Json, status: QLoRAFinetuneStatus) -> None:
        """Replace the status unless the resource changed since it was read (ApiError 409)."""
        key = Key(raw["metadata"]["namespace"], raw["metadata"]["name"])
        body = {**raw, "status": status.to_wire()}
        query = {"fieldManager": names.FIELD_MANAGER}
        await self._kube.request("PUT", f"{_run_path(key)}/status", query=query, body=body)

    async def perform(self, key: Key, actions: Iterable[Action]) -> tuple[Refusal, ...]:
        """Carry the actions out in order; returns what the API server refused for good reasons of its own."""
        for action in actions:
            try:
                await self._perform(key, action)
            except ApiError as error:
                if isinstance(action, CreatePod) and is_refusal(error):
                    return (Refusal(action.name, error.status, error.message),)
                if not _is_success(action, error):
                    raise
        return ()

    async def _perform(self, key: Key, action: Action) -> None:
        core = f"/api/v1/namespaces/{key.namespace}"
        match action:
            case ApplyObject(body):
                path = f"{core}/{_KINDS[body['kind']]}/{body['metadata']['name']}"
                query = {"fieldManager": names.FIELD_MANAGER, "force": "true"}
                await self._kube.request("PATCH", path, query=query, body=body, content_type=APPLY)
            case CreatePod(_, body):  # strict: a misspelt field of podTemplate is refused by name, not dropped
                query = {"fieldManager": names.FIELD_MANAGER, "fieldValidation": "Strict"}
                await self._kube.request("POST", f"{core}/pods", query=query, body=body)
            case DeletePod(name, uid, force):
                body = {**_precondition(uid), **({"gracePeriodSeconds": 0} if force else {})}
                await self._kube.request("DELETE", f"{core}/pods/{name}", body=body)
            case DeleteRun(uid):
                body = {**_precondition(uid), "propagationPolicy": "Background"}
                await self._kube.request("DELETE", _run_path(key), body=body)

    async def tell(self, run: RunIdentity, events: Iterable[Event], now: datetime) -> None:
        """Write events; one that is lost is lost."""
        for event in events:
            try:
                path = f"/apis/events.k8s.io/v1/namespaces/{run.namespace}/events"
                await self._kube.request("POST", path, body=_event_body(run, event, now))
            except ApiError as error:
                log.warning("event %s not written: %s", event.reason, error)

    async def review(self, token: str) -> PodIdentity | None:
        """Whose token this is, if it was issued to a pod for our audience."""
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [TOKEN_AUDIENCE]},
        }
        answer = await self._kube.request("POST", "/apis/authentication.k8s.io/v1/tokenreviews", body=body)
        return parse_review(answer.get("status", {}))


def parse_run(raw: Json) -> Run:
    """The resource; raises ValueError when its spec does not fit this operator's types."""
    metadata = raw["metadata"]
    try:
        spec = QLoRAFinetuneSpec.model_validate(raw["spec"])
    except ValidationError as error:
        raise ValueError(f"spec of {metadata['name']} cannot be read, is the CRD newer? {error}") from error
    labels = metadata.get("labels", {})
    return Run(
        RunIdentity(namespace=metadata["namespace"], name=metadata["name"], uid=metadata["uid"]),
        spec,
        datetime.fromisoformat(metadata["creationTimestamp"]),
        metadata.get("generation", 1),
        tuple((label, labels[label]) for label in PASSED_ON_LABELS if label in labels),
    )


def parse_review(status: Json) -> PodIdentity | None:
    """A TokenReview's answer; None unless a service account's token that is bound to a pod."""
    if not status.get("authenticated") or TOKEN_AUDIENCE not in status.get("audiences", []):
        return None
    user = status.get("user", {})
    parts, extra = user.get("username", "").split(":"), user.get("extra", {})
    if len(parts) != 4 or parts[:2] != ["system", "serviceaccount"] or _POD_UID not in extra:
        return None
    return PodIdentity(parts[2], parts[3], extra[_POD_NAME][0], extra[_POD_UID][0])


def is_refusal(error: ApiError) -> bool:
    """The pod itself is refused; that we lack a right is another matter."""
    return error.status in _REFUSALS and "cannot create resource" not in error.message


def _is_success(action: Action, error: ApiError) -> bool:
    """It exists already, or is gone already, or another one has taken its name."""
    match action:
        case CreatePod():
            return error.status == 409 and error.reason == "AlreadyExists"
        case DeletePod() | DeleteRun():
            return error.status in (404, 409)
    return False


def _is_owned_by(pod: Json, uid: str) -> bool:
    return any(owner["uid"] == uid for owner in pod["metadata"].get("ownerReferences", []))


def _run_path(key: Key) -> str:
    return f"{_RUNS}/namespaces/{key.namespace}/{names.PLURAL}/{key.name}"


def _precondition(uid: str) -> Json:
    return {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}}


def _event_body(run: RunIdentity, event: Event, now: datetime) -> Json:
    regarding = {
        "apiVersion": f"{names.GROUP}/{names.VERSION}",
        "kind": names.KIND,
        "namespace": run.namespace,
        "name": run.name,
        "uid": run.uid,
    }
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"generateName": f"{run.name}-", "namespace": run.namespace},
        "eventTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "reportingController": f"{names.GROUP}/operator",
        "reportingInstance": socket.gethostname()[:128],
        "action": event.reason,
        "reason": event.reason,
        "regarding": regarding,
        "note": event.message[:1024],
        "type": event.kind,
    }
