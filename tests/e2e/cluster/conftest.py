"""The running cluster of CLUSTER_NAME (`make cluster-up`), a namespace on it and a pod on every node.

These tests kill and cut its nodes and daemons: with CLUSTER=current none of them is chosen.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hack.cluster import namespaces
from hack.cluster.settings import DEFAULT_NAME, Cluster, load
from tests.e2e.cluster.support import NAMESPACE, Kubectl, eventually, pod


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Cluster:
    found = load(os.environ.get("CLUSTER_NAME", DEFAULT_NAME))
    if namespaces.find(found.dir) is None:
        pytest.fail(f"cluster {found.name} doesn't run: make cluster-up")
    return found


@pytest.fixture(scope="session")
def kubectl(cluster: Cluster) -> Iterator[Kubectl]:
    run = Kubectl(cluster)
    run("delete", "namespace", NAMESPACE, "--ignore-not-found")
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    run.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}})
    eventually("default service account", lambda: "default" in run("get", "serviceaccounts"))
    yield run
    run("delete", "namespace", NAMESPACE, "--wait=false")


@pytest.fixture(scope="session")
def image(cluster: Cluster) -> str:
    """The operator's image: it has a Python, and it came to the nodes the way every image does."""
    command = [sys.executable, "-m", "hack.cluster", "--name", cluster.name, "images", "--only", "operator"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["operator"]


@pytest.fixture(scope="session")
def pods(cluster: Cluster, kubectl: Kubectl, image: str) -> list[str]:
    """A web server with a GPU on every node, each behind a Service of its name."""
    nodes = [number for number in cluster.known_nodes() if namespaces.find(cluster.node_dir(number))]
    token = {"serviceAccountToken": {"path": "token", "audience": "test-audience", "expirationSeconds": 600}}
    volumes = [{"name": "tokens", "projected": {"sources": [token]}}]
    for number in nodes:
        name = f"web{number}"
        service = {"selector": {"app": name}, "ports": [{"port": 80, "targetPort": 8000}]}
        kubectl.create(
            pod(name, image, number, volumes=volumes),
            {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": service},
        )
    names = [f"web{number}" for number in nodes]
    for name in names:
        eventually(f"pod {name} Ready", lambda name=name: kubectl.ready(name))
    return names
