"""Whatever can be wrong in a spec is refused by `kubectl apply` itself, with words that say what to write instead."""

import copy
from typing import Any

import pytest
from hack.demo.kubectl import Kubectl

VALID: dict[str, Any] = {
    "apiVersion": "qlora.dev/v1alpha1",
    "kind": "QLoRAFinetune",
    "metadata": {"name": "valid"},
    "spec": {
        "model": {"uri": "hf://org/model"},
        "dataset": {"uri": "s3://data/train.jsonl"},
        "output": {"uri": "s3://adapters/runs"},
    },
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The valid resource with one field set; a value of None removes it."""
    resource = copy.deepcopy(VALID)
    *parents, last = path.split(".")
    node = resource
    for parent in parents:
        node = node.setdefault(parent, {})
    if value is None:
        del node[last]
    else:
        node[last] = value
    return resource


REFUSED: list[tuple[str, Any, str]] = [
    ("spec.lora.rank", 8, 'unknown field "spec.lora.rank"'),
    ("spec.model", None, "spec.model: Required value"),
    ("spec.dataset", None, "spec.dataset: Required value"),
    ("spec.output", None, "spec.output: Required value"),
    ("spec.lora.r", 0, "should be greater than or equal to 1"),
    ("spec.lora.r", 1.5, "must be of type integer"),
    ("spec.lora.alpha", 0, "should be greater than 0"),
    ("spec.lora.dropout", 1, "write at most 0.9"),
    ("spec.lora.targetModules", [], "should have at least 1 items"),
    ("spec.elasticPolicy", {"minNodes": 3, "maxNodes": 2}, "lower minNodes or raise maxNodes"),
    ("spec.elasticPolicy", {"minNodes": 2}, "lower minNodes or raise maxNodes"),
    ("spec.elasticPolicy", {"minNodes": 0}, "should be greater than or equal to 1"),
    ("spec.quantization.storageDtype", "float16", "set both to bfloat16 (or both to float16 or float32)"),
    ("spec.quantization.type", "int4", 'supported values: "nf4", "fp4", "none"'),
    (
        "spec.model.uri",
        "meta-llama/Llama-3.1-8B",
        "write hf://org/name, s3://bucket/path, pvc://claim/path or file:///",
    ),
    (
        "spec.dataset.uri",
        "https://example.org/x",
        "write hf://org/name, s3://bucket/path, pvc://claim/path or file:///",
    ),
    ("spec.dataset.evalUri", "eval.jsonl", "write hf://org/name, s3://bucket/path, pvc://claim/path or file:///"),
    ("spec.output.uri", "/mnt/adapters", "write s3://bucket/prefix"),
    ("spec.output.uri", "s3://B/x", "write s3://bucket/prefix"),
    ("spec.output.endpoint", "minio:9000", "write http://host:port or https://host:port"),
    ("spec.output.secretRef", {"name": ""}, "should be at least 1 chars long"),
    ("spec.training.learningRate", 0, "should be greater than 0"),
    ("spec.training.maxSteps", 0, "should be greater than or equal to 1"),
    (
        "spec.training",
        {"globalBatchSize": 6, "microBatchSize": 4},
        "globalBatchSize must be a multiple of microBatchSize",
    ),
    ("spec.training.optimizer", "sgd", 'supported values: "adamw", "adamw_8bit", "paged_adamw_8bit"'),
    ("spec.numProcPerNode", 0, "should be greater than or equal to 1"),
    ("spec.numProcPerNode", 2, "raise resourcesPerNode.limits['nvidia.com/gpu'] or lower numProcPerNode"),
    ("spec.resourcesPerNode", {"limits": {"cpu": "two"}}, "limits[cpu]: Invalid value"),
    ("spec.resourcesPerNode", {"limits": {"cpu": "two"}}, "write a Kubernetes quantity"),
    ("spec.resourcesPerNode", {"limits": {"cpu": "-1"}}, "write a Kubernetes quantity"),
    ("spec.resourcesPerNode", {"limits": {"memory": "6GB"}}, "of memory (Gi, not GB)"),
    ("spec.resourcesPerNode", {"requests": {"memory": "6 Gi"}}, "write a Kubernetes quantity"),
    ("spec.resourcesPerNode", {"limits": {"memory": "6m"}}, "memory is less than 64Mi: write for example 16Gi"),
    ("spec.resourcesPerNode", {"limits": {"memory": 16}}, "memory is less than 64Mi: write for example 16Gi"),
    ("spec.resourcesPerNode", {"limits": {"nvidia.com/gpu": "0.5"}}, "write a whole number of GPUs for nvidia.com/gpu"),
    ("spec.podTemplate", {"metadata": {"label": {"a": "b"}}}, 'unknown field "spec.podTemplate.metadata.label"'),
    ("spec.training", {"earlyStoppingPatience": 2}, "earlyStoppingPatience needs evaluations: set"),
    (
        "spec.training",
        {"cpuOffload": True, "shardingStrategy": "NO_SHARD"},
        "set shardingStrategy to auto or FULL_SHARD",
    ),
    ("spec.checkpoint.keep", 0, "should be greater than or equal to 1"),
    ("spec.ttlSecondsAfterFinished", -1, "should be greater than or equal to 0"),
    ("metadata.name", "a" * 49, "metadata.name must have at most 48 characters"),
    ("metadata.name", "Upper_Case", "lowercase RFC 1123 subdomain"),
]


@pytest.mark.parametrize(
    ("path", "value", "sentence"), REFUSED, ids=[f"{path}={str(v)[:30]}" for path, v, _ in REFUSED]
)
def test_a_wrong_value_is_refused_with_what_to_write(kubectl: Kubectl, path: str, value: Any, sentence: str) -> None:
    answer = kubectl.apply(changed(path, value), "--dry-run=server")
    assert answer.returncode != 0, answer.stdout
    assert sentence in answer.stderr


ACCEPTED: list[dict[str, Any]] = [
    {"numProcPerNode": 8, "resourcesPerNode": {"limits": {"nvidia.com/gpu": 8}}},
    {"numProcPerNode": 2, "resourcesPerNode": {"limits": {"nvidia.com/gpu": "4"}}},
    {"numProcPerNode": 2, "resourcesPerNode": {"limits": {"cpu": "2"}}},  # on CPUs
    {"numProcPerNode": 2, "resourcesPerNode": {"limits": {"nvidia.com/gpu": 0}}},
    {
        "training": {"earlyStoppingPatience": 2, "evalIntervalSteps": 50},
        "dataset": {"uri": "s3://data/train.jsonl", "evalFraction": 0.1},
    },
    {"training": {"cpuOffload": True}},
    {"resourcesPerNode": {"requests": {"cpu": "500m", "memory": "64Mi"}, "limits": {"cpu": 2, "memory": "1.5G"}}},
    {"resourcesPerNode": {"limits": {"memory": 17179869184, "rdma/hca": "1", "ephemeral-storage": "1e11"}}},
]


@pytest.mark.parametrize("spec", ACCEPTED, ids=str)
def test_what_fits_together_is_taken(kubectl: Kubectl, spec: dict[str, Any]) -> None:
    answer = kubectl.apply({**VALID, "spec": {**VALID["spec"], **spec}}, "--dry-run=server")
    assert answer.returncode == 0, answer.stderr


def test_paged_optimizer_on_more_than_one_gpu_is_refused(kubectl: Kubectl) -> None:
    resource = changed("spec.training.optimizer", "paged_adamw_8bit")
    assert kubectl.apply(resource, "--dry-run=server").returncode == 0
    for more in ({"elasticPolicy": {"maxNodes": 2}}, {"numProcPerNode": 2}):
        answer = kubectl.apply({**resource, "spec": {**resource["spec"], **more}}, "--dry-run=server")
        assert "write adamw or adamw_8bit" in answer.stderr


IMMUTABLE = [
    ("spec.model.uri", "hf://org/other"),
    ("spec.dataset.uri", "s3://data/other.jsonl"),
    ("spec.quantization.doubleQuant", False),
    ("spec.lora.r", 8),
    ("spec.training.seed", 1),
    ("spec.output.uri", "s3://adapters/elsewhere"),
]


@pytest.mark.parametrize(("path", "value"), IMMUTABLE, ids=[path for path, _ in IMMUTABLE])
def test_what_defines_the_result_cannot_change(kubectl: Kubectl, path: str, value: Any) -> None:
    assert kubectl.apply(VALID).returncode == 0
    answer = kubectl.apply(changed(path, value))
    field = path.split(".")[1]
    assert f"{field} cannot change during a run: create a new QLoRAFinetune with the new {field}" in answer.stderr


MUTABLE = [("spec.suspend", True), ("spec.elasticPolicy", {"minNodes": 1, "maxNodes": 4}), ("spec.checkpoint.keep", 5)]


@pytest.mark.parametrize(("path", "value"), MUTABLE, ids=[path for path, _ in MUTABLE])
def test_what_steers_a_run_can_change(kubectl: Kubectl, path: str, value: Any) -> None:
    assert kubectl.apply(VALID).returncode == 0
    answer = kubectl.apply(changed(path, value))
    assert answer.returncode == 0, answer.stderr
