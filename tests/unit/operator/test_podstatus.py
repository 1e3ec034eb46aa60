"""Pods as the API server tells them."""

from typing import Any

import pytest
from tests.unit.operator.build import NOW

from qlora_api.names import Reason
from qlora_operator.podstatus import is_mounting, parse_pod


def raw(
    status: dict[str, Any] | None = None, metadata: dict[str, Any] | None = None, node: str = "n"
) -> dict[str, Any]:
    labels = {"qlora.dev/run": "r", "qlora.dev/index": "1", "qlora.dev/incarnation": "3"}
    base = {
        "name": "r-1-3",
        "namespace": "ns",
        "uid": "u",
        "creationTimestamp": "2026-06-01T11:59:00Z",
        "labels": labels,
    }
    return {"metadata": {**base, **(metadata or {})}, "spec": {"nodeName": node}, "status": status or {}}


def container(state: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"phase": "Running", "containerStatuses": [{"name": "trainer", "restartCount": 0, "state": state, **more}]}


def test_a_new_pod() -> None:
    pod = parse_pod(raw(), NOW)
    assert (pod.index, pod.incarnation, pod.age, pod.phase, pod.live) == (1, 3, 60.0, "Pending", True)


def test_a_pod_on_its_way_out() -> None:
    condition = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}
    metadata = {"deletionTimestamp": "2026-06-01T12:00:00Z"}
    pod = parse_pod(raw({"phase": "Running", "conditions": [condition]}, metadata), NOW)
    assert pod.deleting and not pod.live and pod.reason == "DeletionByTaintManager"


def test_a_container_that_ended_and_one_that_came_back() -> None:
    message = '{"exitCode": 65, "reason": "InvalidDataset", "message": "line 3"}'
    terminated = {"terminated": {"exitCode": 65, "reason": "Error", "message": message}}
    down = parse_pod(raw(container(terminated)), NOW)
    assert down.ended and down.restarts == 1 and down.exit is not None
    assert down.exit.termination is not None and down.exit.termination.message == "line 3"
    up = parse_pod(raw(container({"running": {}}, restartCount=1, lastState=terminated)), NOW)
    assert not up.ended and up.restarts == 1 and up.exit == down.exit
    plain = {"terminated": {"exitCode": 1, "reason": "Error", "message": "Traceback ..."}}
    assert parse_pod(raw(container(plain)), NOW).exit.message == "Traceback ..."


@pytest.mark.parametrize("reason", ["ErrImagePull", "ImagePullBackOff", "InvalidImageName"])
def test_images(reason: str) -> None:
    pod = parse_pod(raw(container({"waiting": {"reason": reason, "message": "no such image x:1"}})), NOW)
    assert pod.trouble is not None and pod.trouble.reason == Reason.IMAGE_PULL_FAILED
    assert "no such image x:1" in pod.trouble.message


def test_unschedulable() -> None:
    condition = {"type": "PodScheduled", "status": "False", "message": "0/2 nodes are available"}
    pod = parse_pod(raw({"phase": "Pending", "conditions": [condition]}, node=""), NOW)
    assert pod.trouble is not None and pod.trouble.reason == Reason.UNSCHEDULABLE


def test_a_secret_that_the_kubelet_misses() -> None:
    pod = parse_pod(raw(), NOW, ('MountVolume.SetUp failed for volume "secret-model" : secret "hub" not found',))
    assert pod.trouble is not None and pod.trouble.reason == Reason.MISSING_SECRET
    assert "Secret hub does not exist in namespace ns" in pod.trouble.message


def test_what_else_cannot_be_mounted_is_told_after_a_while() -> None:
    messages = ("failed to sync configmap cache", "MountVolume.SetUp failed: no space left on device")
    young = {"creationTimestamp": "2026-06-01T11:59:40Z"}
    assert parse_pod(raw(metadata=young), NOW, messages).trouble is None
    pod = parse_pod(raw(), NOW, messages)
    assert pod.trouble is not None and pod.trouble.reason == Reason.MOUNT_FAILED
    assert "r-1-3: MountVolume.SetUp failed: no space left on device; check" in pod.trouble.message


def test_who_may_be_mounting() -> None:
    creating = {
        "phase": "Pending",
        "containerStatuses": [{"name": "trainer", "state": {"waiting": {"reason": "ContainerCreating"}}}],
    }
    assert is_mounting(raw({"phase": "Pending"})) and is_mounting(raw(creating))
    mounted = {"type": "PodReadyToStartContainers", "status": "True"}
    assert not is_mounting(raw({**creating, "conditions": [mounted]})), "it pulls its image"
    assert not is_mounting(raw({"phase": "Pending"}, node="")) and not is_mounting(raw(container({"running": {}})))
