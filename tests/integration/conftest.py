"""A real API server (etcd and kube-apiserver, no nodes) for the tests that need one, and kubectl as users run it."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hack.demo.kubectl import ROOT, Kubectl, cluster

NAME = f"integration-{os.getpid()}"  # two sessions on one machine, from two clones say, must not share it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files first: side by side with all the others, and not alone at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def api_server() -> Iterator[Path]:
    """Administrator's kubeconfig of a bare control plane that lives as long as the session."""
    cluster("up", "--control-plane-only", name=NAME)
    try:
        yield Path(json.loads(cluster("status", name=NAME))["kubeconfig"])
    finally:
        cluster("down", name=NAME)


@pytest.fixture(scope="session")
def kubectl(api_server: Path) -> Kubectl:
    """kubectl against that API server with the CRD installed."""
    administrator = Kubectl(api_server)
    administrator.must("apply", "--server-side", "-f", str(ROOT / "crds"))
    administrator.must("wait", "--for=condition=Established", "crd/qlorafinetunes.qlora.dev", "--timeout=30s")
    return administrator
