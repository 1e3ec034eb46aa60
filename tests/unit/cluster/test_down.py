"""What `down` says before S3 goes: which buckets hold something, and how to keep them."""

from pathlib import Path

import pytest
from hack.cluster import cgroups, leftovers, lifecycle, network, s3, settings
from hack.cluster.settings import Cluster


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """A cluster that has ended, with volumes as SeaweedFS names them."""
    monkeypatch.setattr(settings, "CACHE", tmp_path)
    monkeypatch.setattr(network, "disconnect_host", lambda cluster: None)
    monkeypatch.setattr(cgroups, "remove", lambda cluster: None)
    monkeypatch.setattr(leftovers, "wait_until_gone", lambda cluster, timeout: [])
    found = Cluster("unit", 7)
    data = found.dir / "s3" / "data"
    data.mkdir(parents=True)
    volumes = {"my_own.bucket_9": 1_000_000, "my_own.bucket_12": 2_000_000, "empty_3": 8, "qlora-demo_1": 4_000_000}
    for name, size in volumes.items():
        (data / f"{name}.dat").write_bytes(bytes(size))
        (data / f"{name}.idx").write_bytes(bytes(100))
    return found


def test_buckets_that_hold_something(cluster: Cluster) -> None:
    assert s3.buckets(cluster) == {"my_own.bucket": 3_000_000, "qlora-demo": 4_000_000}
    assert s3.buckets(Cluster("other", 6)) == {}


def test_down_says_what_goes_and_how_to_keep_it(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    lifecycle.down(cluster)
    said = capsys.readouterr().err
    assert "its S3 buckets my_own.bucket (3.0 MB), qlora-demo (4.0 MB) go with it, adapters included" in said
    assert "make cluster-down KEEP=1" in said
    assert not cluster.dir.exists()


def test_down_keeps(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    lifecycle.down(cluster, keep=True)
    assert "qlora-demo (4.0 MB) stay for the next up" in capsys.readouterr().err
    assert (cluster.dir / "s3" / "data" / "qlora-demo_1.dat").exists()


def test_groups_of_every_hierarchy_go(monkeypatch, tmp_path):
    """Also of `unified`, which only the container runtime uses; other clusters' stay."""
    monkeypatch.setattr(cgroups, "_ROOT", tmp_path)
    cluster = settings.Cluster("mine", 3)
    for hierarchy in ("memory", "unified"):
        for name in (cluster.cgroup, "qlora-other"):
            (tmp_path / hierarchy / name / "node1" / "kubepods" / "pod1").mkdir(parents=True)
    assert len(cgroups.left(cluster)) == 8
    cgroups.remove(cluster)
    assert not cgroups.left(cluster) and len(list(tmp_path.rglob("pod1"))) == 2
