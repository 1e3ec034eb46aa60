"""What a machine that can't carry the local cluster is told."""

import os
import platform
import shutil
from collections import namedtuple

import pytest
from hack.cluster import preflight, settings

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def cluster() -> settings.Cluster:
    return settings.Cluster("unit", 7)


@pytest.fixture(autouse=True)
def no_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    """A cache of its own, on an empty disk of 100 GB, without routes."""
    monkeypatch.setattr(preflight, "CACHE", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100e9, 0, 100e9))
    monkeypatch.setattr(preflight, "_network", lambda cluster: [])


def refusal(cluster: settings.Cluster) -> str:
    with pytest.raises(ValueError, match="no local cluster on this machine") as caught:
        preflight.check(cluster, only_api=False)
    return str(caught.value)


def test_not_root(monkeypatch: pytest.MonkeyPatch, cluster: settings.Cluster) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    text = refusal(cluster)
    assert "it needs root" in text and "sudo" in text
    assert "make CLUSTER=current REGISTRY=HOST/PATH deploy" in text


def test_not_linux(monkeypatch: pytest.MonkeyPatch, cluster: settings.Cluster) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    text = refusal(cluster)
    assert "it needs Linux, this is Darwin" in text
    assert "make CLUSTER=current REGISTRY=HOST/PATH deploy" in text


def test_everything_that_is_missing_is_told_at_once(monkeypatch: pytest.MonkeyPatch, cluster: settings.Cluster) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1e9, 0.5e9, 0.5e9))
    monkeypatch.setattr(preflight, "_network", lambda cluster: ["its route to 10.250.7.0/24 overlaps"])
    lines = refusal(cluster).splitlines()
    assert next(line for line in lines if line.startswith("  - ")) == "  - it needs Linux, this is Darwin"
    assert "  - its route to 10.250.7.0/24 overlaps" in lines
    assert any("GB are needed: set XDG_CACHE_HOME" in line for line in lines)


def test_images_for_another_cluster_need_docker_or_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ValueError, match="no images can be built here") as caught:
        preflight.check_images(current=True)
    assert "it needs root" in str(caught.value)
    assert "Install Docker" in str(caught.value)
    assert "CLUSTER=current" not in str(caught.value), "that is what the user did"
