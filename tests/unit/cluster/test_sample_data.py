"""`make sample-data`: bucket, namespace and Secret, and what to type then."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hack.demo import upload
from hack.demo.kubectl import Kubectl

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
STORE = upload.Store(KEYS, "http://10.250.0.1:8333", "http://s3")
Call = tuple[tuple[str, ...], str | None]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What kubectl is called with, on a cluster that has the namespace `default` alone."""
    found: list[Call] = []

    def must(self: Kubectl, *words: str, stdin: str | None = None) -> str:
        found.append((words, stdin))
        return '{"kind": "Namespace"}' if words[:3] == ("get", "namespace", "default") else ""

    monkeypatch.setattr(Kubectl, "must", must)
    monkeypatch.setattr(Kubectl, "find", classmethod(lambda cls, namespace: cls(Path("/c/kubeconfig"), namespace)))
    monkeypatch.setattr(upload.Store, "find", classmethod(lambda cls: STORE))
    monkeypatch.setattr(upload, "upload", lambda client: ["data/train.jsonl"])
    return found


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def main(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["upload", *words])
        return upload.main()

    return main


@pytest.mark.parametrize(("namespace", "created"), [("default", False), ("my-runs", True)])
def test_a_namespace_with_its_secret(
    run: Any, calls: list[Call], capsys: pytest.CaptureFixture[str], namespace: str, created: bool
) -> None:
    assert run("--namespace", namespace) == 0
    assert (("create", "namespace", namespace), None) in calls if created else len(calls) == 2
    secret = json.loads(calls[-1][1] or "")
    assert secret["metadata"]["name"] == "qlora-s3"
    assert secret["stringData"]["AWS_ENDPOINT_URL"] == "http://s3", "as pods reach it"
    said = capsys.readouterr().out
    assert "s3://qlora-demo/data/train.jsonl" in said
    assert f"export KUBECONFIG=/c/kubeconfig\nkubectl -n {namespace} apply -f examples/minimal.yaml\n" in said


def test_the_bucket_alone(run: Any, calls: list[Call]) -> None:
    assert run() == 0
    assert calls == []


def test_another_bucket_is_put_into_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "BUCKET", "mine")
    said = upload.next_steps(Kubectl(None, "x"))
    assert said == "kubectl -n x apply -f <(sed 's,s3://qlora-demo/,s3://mine/,' examples/minimal.yaml)"


def test_a_cluster_that_does_not_run_is_told(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLUSTER", "local")
    monkeypatch.setattr(upload, "cluster", lambda *words: json.dumps({"running": False}))
    assert run("--namespace", "x") == 1
    assert "doesn't run; start it with: make cluster-up" in capsys.readouterr().err
