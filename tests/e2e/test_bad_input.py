"""What only turns out on the cluster: each bad input ends in a condition that says what to do, and its pods are gone.

All runs are applied at once; each test looks at its own.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from hack.demo import upload, watch
from hack.demo.kubectl import Kubectl, Manifest
from tests.e2e.support import Applied, fresh_namespace

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

NAMESPACE = "qlora-e2e-bad"
BUCKET = upload.BUCKET
ONE_THREAD = [{"name": "OMP_NUM_THREADS", "value": "1"}]
END_SECONDS = 420  # five runs import torch at once on two cores
MALFORMED = '{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": \n{"prompt": "e", "completion": "f"}\n'


def run(name: str, **changes: Any) -> Manifest:
    """A run that would work, but for the changes of its spec: a part's fields are merged in, anything else replaces."""
    secret = {"secretRef": {"name": upload.SECRET}}
    spec: dict[str, Any] = {
        "model": {"uri": f"s3://{BUCKET}/{upload.MODEL_PREFIX}", **secret},
        "dataset": {"uri": f"s3://{BUCKET}/data/small.jsonl", **secret},
        "output": {"uri": f"s3://{BUCKET}/runs", **secret},
        "training": {"maxSteps": 1, "globalBatchSize": 1, "maxLength": 32},
        "resourcesPerNode": {"limits": {"memory": "3Gi"}, "requests": {"cpu": "200m", "memory": "512Mi"}},
        "podTemplate": {"spec": {"containers": [{"name": "trainer", "env": ONE_THREAD}]}},
    }
    for part, change in changes.items():
        spec[part] = {**spec.get(part, {}), **change} if isinstance(change, dict) else change
    return {
        "apiVersion": "qlora.dev/v1alpha1",
        "kind": "QLoRAFinetune",
        "metadata": {"name": name},
        "spec": spec,
    }


BAD: dict[str, tuple[Manifest, str, tuple[str, ...]]] = {
    "unreachable S3": (
        # the first failure ends it: how many are forgiven is for tests that need no cluster
        run("unreachable", dataset={"endpoint": "http://127.0.0.1:9"}, failurePolicy={"maxFailures": 0}),
        "StorageUnavailable",
        ("127.0.0.1:9", "Check endpoint, bucket and the Secret's keys"),
    ),
    "missing Secret": (
        run("no-secret", model={"secretRef": {"name": "nowhere"}}),
        "MissingSecret",
        ("Secret nowhere does not exist in namespace qlora-e2e-bad", "create it"),
    ),
    "model without a tokenizer": (
        run("no-tokenizer", model={"uri": f"s3://{BUCKET}/bad/no-tokenizer"}),
        "InvalidModel",
        ("tokenizer", "in a new QLoRAFinetune"),
    ),
    "malformed data set": (
        run("malformed", dataset={"uri": f"s3://{BUCKET}/bad/malformed.jsonl"}),
        "InvalidDataset",
        ("malformed.jsonl:2: not JSON", "one object a line"),
    ),
    "empty data set": (
        run("empty", dataset={"uri": f"s3://{BUCKET}/bad/empty.jsonl"}),
        "InvalidDataset",
        ("empty",),
    ),
    "image that cannot be pulled": (
        run("no-image", image="localhost/nothing:1"),
        "ImagePullFailed",
        ("localhost/nothing:1", "check spec.image"),
    ),
    "no node with so many GPUs": (
        run("no-room", resourcesPerNode={"limits": {"nvidia.com/gpu": 1000}}, startDeadlineSeconds=15),
        "StartDeadlineExceeded",
        ("Insufficient nvidia.com/gpu", "add nodes, or lower resourcesPerNode"),
    ),
}


def put_bad_sources(client: "S3Client") -> None:
    """A model without its tokenizer, an empty file and one with a broken line."""
    for key, _ in upload.files():
        name = key.rsplit("/", 1)[-1]
        if key.startswith(upload.MODEL_PREFIX) and name in ("config.json", "model.safetensors"):
            source = {"Bucket": BUCKET, "Key": key}
            client.copy_object(Bucket=BUCKET, Key=f"bad/no-tokenizer/{name}", CopySource=source)  # type: ignore[arg-type]
    client.put_object(Bucket=BUCKET, Key="bad/malformed.jsonl", Body=MALFORMED.encode())
    client.put_object(Bucket=BUCKET, Key="bad/empty.jsonl", Body=b"")


@pytest.fixture(scope="module")
def bad_runs(kubectl: Kubectl, store: upload.Store) -> Iterator[dict[str, Applied]]:
    """All of BAD, applied at once in a namespace of their own."""
    put_bad_sources(store.client())
    own = fresh_namespace(dataclasses.replace(kubectl, namespace=NAMESPACE), store)
    runs = {}
    for what, (manifest, _, _) in BAD.items():
        answer = own.apply(manifest)
        assert answer.returncode == 0, answer.stderr
        name = manifest["metadata"]["name"]
        runs[what] = Applied(own, name, watch.RunWatch(own, name))
        runs[what].followed.__enter__()
    yield runs
    for applied in runs.values():
        applied.followed.__exit__()
    own.must("delete", "namespace", NAMESPACE, "--wait=false")


@pytest.mark.parametrize("what", BAD)
def test_it_ends_in_a_condition_that_says_what_to_do(bad_runs: dict[str, Applied], what: str) -> None:
    _, reason, words = BAD[what]
    failed = None
    for state in bad_runs[what].followed.states(END_SECONDS):
        assert watch.word(state) != "Succeeded"
        if watch.word(state) == "Failed":
            failed = state
            break
    assert failed is not None, f"not Failed within {END_SECONDS} s: {watch.describe(state)}"
    condition = watch.condition(failed, "Failed")
    assert condition is not None and condition["status"] == "True"
    assert condition["reason"] == reason, watch.describe(failed)
    for word in words:
        assert word in condition["message"], condition["message"]
    bad_runs[what].without_pods()


def test_a_quota_is_told_and_waited_for(kubectl: Kubectl, store: upload.Store, apply: Any) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}}
    kubectl.must("create", "-f", "-", stdin=json.dumps(quota))
    try:
        applied: Applied = apply(run("over-quota"))
        told = applied.until("QuotaExceeded", lambda state: _running_reason(state) == "QuotaExceeded", 60)
        condition = watch.condition(told, "Running")
        assert condition is not None and "exceeded quota: none" in condition["message"]
        assert applied.pods() == []
    finally:
        kubectl.delete("resourcequota", "none")
    # nothing is lost: it starts by itself once there is room
    applied.until("a pod", lambda state: bool(applied.pods()), 90)


def _running_reason(state: watch.Run) -> str:
    condition = watch.condition(state, "Running")
    return condition["reason"] if condition else ""
