"""Clusters of two caches on one machine don't take each other's addresses."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hack.cluster import settings


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(settings, "CACHE", tmp_path / "mine")
    return tmp_path / "mine"


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Path]:
    """A cluster of another cache: a process that looks like its control plane, and the folder with its index."""
    folder = tmp_path / "theirs" / "clusters" / "other"
    folder.mkdir(parents=True)
    (folder / "index").write_text("7")
    words = ["elsewhere/hack/cluster/init.sh", "other-control-plane", str(folder)]
    program = "print(flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    process.stdout.readline()
    yield folder
    process.kill()
    process.wait()


def test_an_index_that_runs_elsewhere_is_not_given_again(cache, other):
    assert settings.load("new", claim=True).index != 7


def test_a_cluster_whose_index_or_name_runs_elsewhere_is_refused(cache, other):
    (cache / "clusters" / "older").mkdir(parents=True)
    (cache / "clusters" / "older" / "index").write_text("7")
    for name in ("older", "other"):
        with pytest.raises(ValueError, match=f"the cluster in {other} is in the way of {name}"):
            settings.load(name)


def test_a_claim_is_kept(cache):
    first = settings.load("one", claim=True)
    assert settings.load("two", claim=True).index != first.index == settings.load("one").index
