"""What the demo says at its end: where everything is, and how to take it down."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from hack.demo import demo
from hack.demo.kubectl import ROOT, Kubectl

URI = "s3://qlora-demo/runs/smollm2-1a2b3c4d/adapter/gen-00003"
RUN: dict[str, Any] = {"status": {"artifacts": {"adapterUri": URI}}}


@pytest.fixture(autouse=True)
def kubectl_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")


@pytest.mark.parametrize(("name", "down"), [("qlora", "make cluster-down"), ("x", "make CLUSTER_NAME=x cluster-down")])
def test_the_local_cluster_goes_on(name: str, down: str) -> None:
    folder = Path("/cache/clusters") / name
    said = demo.what_stays(RUN, Kubectl(folder / "kubeconfig", "qlora-demo"))
    assert f"export KUBECONFIG={folder}/kubeconfig\n  kubectl -n qlora-demo get qft\n" in said
    assert f"adapter: {URI}\n" in said
    assert f"{folder}/s3.env" in said
    assert f"Take it down: {down} (deletes S3, the adapter included; {down} KEEP=1 keeps both)" in said


def test_another_cluster_is_left_to_its_owner() -> None:
    said = demo.what_stays(RUN, Kubectl(None, "qlora-demo"))
    assert "kubectl -n qlora-demo get qft" in said
    assert "KUBECONFIG" not in said and "cluster-down" not in said
    assert "kubectl delete namespace qlora-demo && make CLUSTER=current undeploy" in said


def test_kubectl_of_the_cache_where_the_path_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(demo, "program", lambda name: f"/cache/bin/{name}")
    assert "  /cache/bin/kubectl -n qlora-demo get qft" in demo.what_stays(
        RUN, Kubectl(Path("/c/qlora/kubeconfig"), "qlora-demo")
    )


def test_the_times_that_it_names_were_measured() -> None:
    results = (ROOT / "benchmarks/results.md").read_text()
    assert "| whole demo | 286 s" in results and "| all of it | 1,879 s" in results
    assert "286 s" in demo.MEASURED and "1,879 s" in demo.MEASURED
