"""CLUSTER=current, tried on the local cluster as if it were any other, with a registry beside it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from hack.cluster import lifecycle, namespaces
from hack.cluster.images import seed
from hack.cluster.settings import PROJECT, Cluster
from tests.e2e.cluster.support import Kubectl, eventually, pod

pytestmark = pytest.mark.local
Environment = dict[str, str]


@pytest.fixture(scope="module")
def current(cluster: Cluster) -> Environment:
    """What a user sets: a context, CLUSTER and REGISTRY."""
    url = lifecycle.start_registry(cluster)
    return os.environ | {"CLUSTER": "current", "KUBECONFIG": str(cluster.kubeconfig), "REGISTRY": f"{url}/qlora"}


def run(environment: Environment, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hack.cluster", *words]
    return subprocess.run(command, env=environment, cwd=PROJECT, capture_output=True, text=True, check=False)


def test_up_says_which_cluster_it_takes(cluster: Cluster, current: Environment) -> None:
    done = run(current, "up")
    assert done.returncode == 0, done.stderr
    assert f"context qlora-{cluster.name}, https://{cluster.control_plane}:6443, Kubernetes v1." in done.stderr


def test_a_pod_runs_an_image_from_the_registry(cluster: Cluster, current: Environment, kubectl: Kubectl) -> None:
    done = run(current, "images", "--only", "operator")
    assert done.returncode == 0, done.stderr
    reference = json.loads(done.stdout)["operator"]
    prefix = current["REGISTRY"].removeprefix("http://")
    assert re.fullmatch(rf"{re.escape(prefix)}/qlora-operator@sha256:[0-9a-f]{{64}}", reference)
    node = namespaces.find(cluster.node_dir(1))
    assert node is not None
    # of an earlier test on this cluster
    namespaces.run(node, "ctr", "--namespace", seed.NAMESPACE, "images", "rm", "--sync", reference, check=False)
    kubectl.create(pod("pulled", reference, 1, gpus=0))
    eventually("the pod Ready", lambda: kubectl.ready("pulled"))
    assert kubectl.get("pod", "pulled")["status"]["containerStatuses"][0]["imageID"] == reference
    words = ("get", "events", "--field-selector=involvedObject.name=pulled,reason=Pulled", "-o", "jsonpath={..message}")
    assert f'Successfully pulled image "{reference}"' in kubectl(*words)
    kubectl("delete", "pod", "pulled")


@pytest.mark.parametrize(
    ("registry", "words"),
    [
        ("", ("CLUSTER=current needs REGISTRY=HOST/PATH",)),
        ("me", ("REGISTRY=me: write HOST/PATH", "docker.io/me")),
        ("http://127.0.0.1:9/qlora", ("127.0.0.1:9/qlora/qlora-operator:", "can't be pushed", "connection refused")),
    ],
)
def test_a_registry_that_is_none_is_told(current: Environment, registry: str, words: tuple[str, ...]) -> None:
    done = run(current | {"REGISTRY": registry}, "images", "--only", "operator")
    assert done.returncode == 1
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("command", ["up", "deploy"])
def test_a_context_that_leads_nowhere_is_told(current: Environment, command: str) -> None:
    done = run(current | {"KUBECONFIG": "/dev/null"}, command)
    assert done.returncode == 1
    assert "kubectl reaches no cluster" in done.stderr
    assert "kubectl config use-context" in done.stderr
