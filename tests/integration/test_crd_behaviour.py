"""What the API server makes of the resource: defaults, columns, scale, status, server-side apply."""

import json
from typing import Any

import pytest
from hack.demo.kubectl import Kubectl

from qlora_api.types import QLoRAFinetuneSpec

MINIMAL: dict[str, Any] = {
    "apiVersion": "qlora.dev/v1alpha1",
    "kind": "QLoRAFinetune",
    "metadata": {"name": "minimal"},
    "spec": {
        "model": {"uri": "hf://org/model"},
        "dataset": {"uri": "s3://data/train.jsonl"},
        "output": {"uri": "s3://adapters/runs"},
    },
}
STATUS = {
    "state": "Running",
    "conditions": [
        {"type": "Suspended", "status": "False", "reason": "Resumed", "lastTransitionTime": "2026-01-01T00:00:00Z"},
        {"type": "Running", "status": "True", "reason": "Training", "lastTransitionTime": "2026-01-01T00:00:00Z"},
    ],
    "nodesSummary": "2/2",
    "nodes": {"desired": 2, "ready": 2, "active": 2},
    "progress": {
        "step": 120,
        "totalSteps": 400,
        "loss": 1.25,
        "evalLoss": 1.5,
        "tokensPerSecond": 9800.5,
        "etaSeconds": 61,
    },
    "restarts": {"disruptions": 3, "failures": 1, "byReason": {"NodeLost": 3}},
    "artifacts": {
        "adapterUri": "s3://adapters/runs/minimal-1/adapter",
        "manifestUri": "s3://adapters/runs/minimal-1/manifest.json",
        "adapterBytes": 1024,
        "adapterSha256": "00",
    },
}


@pytest.fixture
def run(kubectl: Kubectl) -> dict[str, Any]:
    """A run with a status, as the operator would leave it."""
    kubectl.delete("qft", "minimal")
    assert kubectl.apply(MINIMAL).returncode == 0
    kubectl.must(
        "patch", "qft", "minimal", "--subresource=status", "--type=merge", "-p", json.dumps({"status": STATUS})
    )
    found = kubectl.get("qft", "minimal")
    assert found is not None
    return found


def test_the_api_server_applies_every_default_that_the_types_name(run: dict[str, Any]) -> None:
    expected = QLoRAFinetuneSpec.model_validate(MINIMAL["spec"]).to_wire()
    assert run["spec"] == expected


def test_a_spec_with_defaults_is_read_back_by_the_types(run: dict[str, Any]) -> None:
    assert QLoRAFinetuneSpec.model_validate(run["spec"]) == QLoRAFinetuneSpec.model_validate(MINIMAL["spec"])


def test_the_columns_say_how_it_is_going(kubectl: Kubectl, run: dict[str, Any]) -> None:
    header, row = kubectl.must("get", "qft", "minimal").splitlines()
    assert header.split() == ["NAME", "STATE", "REASON", "STEP", "OF", "LOSS", "EVAL", "TOK/S", "ETA", "NODES", "AGE"]
    assert row.split()[:10] == ["minimal", "Running", "Training", "120", "400", "1.25", "1.5", "9800.5", "61", "2/2"]
    header, row = kubectl.must("get", "qlorafinetunes", "minimal", "-o", "wide").splitlines()
    assert header.split()[-3:] == ["DISRUPTIONS", "FAILURES", "ADAPTER"]
    assert row.split()[-3:] == ["3", "1", "s3://adapters/runs/minimal-1/adapter"]


def test_scale_reads_the_members_and_writes_max_nodes(kubectl: Kubectl, run: dict[str, Any]) -> None:
    path = "/apis/qlora.dev/v1alpha1/namespaces/default/qlorafinetunes/minimal/scale"
    scale = json.loads(kubectl.must("get", "--raw", path))
    assert (scale["spec"]["replicas"], scale["status"]["replicas"]) == (1, 2)
    kubectl.must("scale", "qft", "minimal", "--replicas=3")
    scaled = kubectl.get("qft", "minimal")
    assert scaled is not None and scaled["spec"]["elasticPolicy"] == {"minNodes": 1, "maxNodes": 3}


def test_scaling_to_nothing_is_refused_with_the_word_for_it(kubectl: Kubectl, run: dict[str, Any]) -> None:
    answer = kubectl.run("scale", "qft", "minimal", "--replicas=0")
    assert answer.returncode != 0 and "to stop the run and free its GPUs set spec.suspend to true" in answer.stderr
    assert "minNodes" not in answer.stderr


def test_server_side_apply_twice_changes_nothing(kubectl: Kubectl, run: dict[str, Any]) -> None:
    words = ("apply", "--server-side", "--field-manager=test", "-f", "-")
    kubectl.must(*words, "--force-conflicts", stdin=json.dumps(MINIMAL))
    first = kubectl.get("qft", "minimal")
    kubectl.must(*words, stdin=json.dumps(MINIMAL))
    assert kubectl.get("qft", "minimal") == first


def test_a_user_cannot_write_status_with_the_spec(kubectl: Kubectl) -> None:
    kubectl.delete("qft", "minimal")
    assert kubectl.apply({**MINIMAL, "status": STATUS}).returncode == 0
    found = kubectl.get("qft", "minimal")
    assert found is not None and "status" not in found


def test_the_spec_does_not_move_with_the_status(kubectl: Kubectl, run: dict[str, Any]) -> None:
    assert run["metadata"]["generation"] == 1


def test_the_pod_template_keeps_fields_that_the_schema_does_not_name(kubectl: Kubectl) -> None:
    marks = {"labels": {"team": "a"}, "annotations": {"cost-center": "7"}}
    template = {"metadata": marks, "spec": {"nodeSelector": {"pool": "spot"}, "hostIPC": False}}
    kubectl.delete("qft", "minimal")
    assert kubectl.apply({**MINIMAL, "spec": {**MINIMAL["spec"], "podTemplate": template}}).returncode == 0
    found = kubectl.get("qft", "minimal")
    assert found is not None and found["spec"]["podTemplate"] == template


def test_explain_describes_the_fields(kubectl: Kubectl) -> None:
    text = kubectl.must("explain", "qft.spec.lora.r")
    assert "Rank of the adapter. Default: 16." in text


def test_the_crd_has_no_condition_that_says_no(kubectl: Kubectl) -> None:
    crd = kubectl.get("crd", "qlorafinetunes.qlora.dev")
    assert crd is not None
    conditions = {item["type"]: item["status"] for item in crd["status"]["conditions"]}
    assert conditions == {"NamesAccepted": "True", "Established": "True"}
