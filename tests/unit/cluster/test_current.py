"""CLUSTER=current: what REGISTRY may be, which images are built by what, and where the examples' store comes from."""

import itertools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hack.cluster import __main__ as ctl
from hack.cluster import current, preflight
from hack.cluster.images import builder, commands, transport
from hack.cluster.settings import Cluster
from hack.demo import upload
from hack.demo.kubectl import ROOT, is_local

DIGEST = "sha256:" + "a" * 64
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}


@pytest.mark.parametrize(
    ("text", "prefix", "plain"),
    [
        ("ghcr.io/me", "ghcr.io/me", False),
        ("https://registry.example.com:5000/team/qlora/", "registry.example.com:5000/team/qlora", False),
        ("http://10.250.0.1:5000", "10.250.0.1:5000", True),
        ("localhost:5001/x", "localhost:5001/x", False),
    ],
)
def test_a_registry(monkeypatch: pytest.MonkeyPatch, text: str, prefix: str, plain: bool) -> None:
    monkeypatch.setenv("REGISTRY", text)
    assert current.Registry.given() == current.Registry(prefix, plain)


@pytest.mark.parametrize("text", ["me", "ghcr.io/Me", "ftp://ghcr.io/me", "ghcr.io/me:tag", "ghcr.io//me", "a b.c/d"])
def test_no_registry(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("REGISTRY", text)
    with pytest.raises(ValueError, match="write HOST/PATH"):
        current.Registry.given()


def test_registry_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REGISTRY", raising=False)
    monkeypatch.setattr(current, "status", dict)
    with pytest.raises(ValueError, match="needs REGISTRY=HOST/PATH"):
        commands.deploy(None, [])


def test_nothing_is_built_for_a_cluster_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kubectl = tmp_path / "kubectl"  # answers as kubectl does when KUBECONFIG names no file
    kubectl.write_text("#!/bin/sh\necho 'connection to the server localhost:8080 was refused' >&2\nexit 1\n")
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("REGISTRY", "ghcr.io/me")
    monkeypatch.setattr(commands, "load_all", lambda cluster, names: pytest.fail("images are built"))
    with pytest.raises(ValueError, match=r"kubectl reaches no cluster. Choose one with KUBECONFIG .* was refused"):
        commands.deploy(None, [])
    with pytest.raises(ValueError, match=r"cluster unit doesn't run; start it with: make cluster-up"):
        commands.deploy(Cluster("unit", 7), [])


def test_docker_builds_where_buildah_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        digests = f'["elsewhere/qlora-operator@{DIGEST}", "ghcr.io/me/qlora-operator@{DIGEST}"]'
        return subprocess.CompletedProcess(command, 0, stdout=digests)

    monkeypatch.setenv("REGISTRY", "ghcr.io/me")
    monkeypatch.setattr(preflight, "machine", lambda: ["it needs Linux, this is Darwin"])
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == "docker" else None)
    monkeypatch.setattr(subprocess, "run", run)
    assert commands.load_all(None, ["operator"]) == {"operator": f"ghcr.io/me/qlora-operator@{DIGEST}"}
    assert [command[1] for command in calls] == ["build", "push", "image"]
    assert calls[0][-3:] == ["--file", "operator/Dockerfile", "."]


def test_a_push_that_fails_says_what_to_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*words: str, **_: Any) -> None:
        raise RuntimeError("buildah push: unauthorized")

    monkeypatch.setattr(builder, "buildah", refuse)
    with pytest.raises(RuntimeError, match=r"ghcr.io/me/qlora-operator:1 can't be pushed.*login.*\n.*unauthorized"):
        transport.push("localhost/qlora-operator:1", current.Registry("ghcr.io/me"))


def test_helm_takes_the_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    references = {"operator": f"ghcr.io/me/qlora-operator@{DIGEST}", "trainer": "localhost/qlora-trainer:1234"}
    monkeypatch.setenv("REGISTRY", "ghcr.io/me")
    monkeypatch.setattr(current, "status", dict)
    monkeypatch.setattr(commands, "load_all", lambda cluster, names: references)
    monkeypatch.setattr(commands, "_helm", lambda cluster, *words: said.extend(words))
    commands.deploy(None, ["--set", "log.level=DEBUG"])
    words = [word for flag, word in itertools.pairwise(said) if flag.startswith("--set")]
    settings = dict(setting.split("=", 1) for word in words for setting in word.split(","))
    assert settings == {
        "image.repository": "ghcr.io/me/qlora-operator",
        "image.digest": DIGEST,
        "trainer.image.repository": "localhost/qlora-trainer",
        "trainer.image.tag": "1234",
        "log.level": "DEBUG",
    }


@pytest.mark.parametrize(("value", "local"), [(None, True), ("", True), ("local", True), ("current", False)])
def test_the_demo_means_the_cluster_that_the_commands_mean(
    monkeypatch: pytest.MonkeyPatch, value: str | None, local: bool
) -> None:
    monkeypatch.delenv("CLUSTER", raising=False)
    if value is not None:
        monkeypatch.setenv("CLUSTER", value)
    assert is_local() is local
    assert ctl._uses_current() is not local


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """CLUSTER=current, and nothing of a store in the environment."""
    for name in (*upload.CREDENTIALS, upload.SESSION, "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_IN_PODS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLUSTER", "current")
    return monkeypatch


def test_every_missing_variable_of_the_store_is_named(elsewhere: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY:"):
        upload.Store.find()
    elsewhere.setenv("AWS_ACCESS_KEY_ID", "key")
    with pytest.raises(ValueError, match="set AWS_SECRET_ACCESS_KEY:"):
        upload.Store.find()


def test_the_store_of_the_environment(elsewhere: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        elsewhere.setenv(name, value)
    aws = upload.Store.find()
    assert aws.secret()["stringData"] == {**KEYS, "AWS_REGION": "us-east-1"}
    elsewhere.setenv("AWS_SESSION_TOKEN", "token")
    elsewhere.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:8333")
    elsewhere.setenv("AWS_ENDPOINT_URL_IN_PODS", "http://s3.example:8333")
    other = upload.Store.find()
    assert other.client().meta.endpoint_url == "http://127.0.0.1:8333"
    data = other.secret()["stringData"]
    assert data["AWS_ENDPOINT_URL"] == "http://s3.example:8333"
    assert data["AWS_SESSION_TOKEN"] == "token"


def test_a_store_that_is_not_there_is_told(elsewhere: pytest.MonkeyPatch) -> None:
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}.items():
        elsewhere.setenv(name, value)
    with pytest.raises(ValueError, match=r"bucket qlora-demo at http://127.0.0.1:9: .*QLORA_BUCKET"):
        upload.upload(upload.Store.find().client())


def test_an_example_in_another_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "BUCKET", "mine")
    for path in (ROOT / "examples").glob("*.yaml"):
        assert "s3://qlora-demo/" not in upload.example(path)
    assert "s3://mine/models/" in upload.example(ROOT / "examples" / "minimal.yaml")
