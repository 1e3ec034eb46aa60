"""The seed: one containerd store with every image in it, which each node's store starts as a clone of.

An import unpacks once; a clone shares blobs and committed snapshots by hard links (containerd never writes to them) and
copies only the two bolt databases: a node more costs a second and no disk. Needs one file system for the whole cache.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import build
from ..progress import step, wait_for
from ..settings import CACHE, HERE, locked
from . import oci

PAUSE = "localhost/pause:1"
_STORE = CACHE / "images" / "seed"
_GENERATION = CACHE / "images" / "seed-generation"  # changes with every import
_DATABASES = ("io.containerd.metadata.v1.bolt/meta.db", "io.containerd.snapshotter.v1.overlayfs/metadata.db")
NAMESPACE = "k8s.io"  # containerd's, where the kubelet looks


@contextmanager
def opened() -> Iterator[list[str]]:
    """Runs a containerd on the seed, alone; yields the words in front of a `ctr` command for it."""
    _STORE.parent.mkdir(parents=True, exist_ok=True)
    with locked("seed"), tempfile.TemporaryDirectory(prefix="qlora-seed-") as scratch:
        socket = f"{scratch}/containerd.sock"
        config = Path(scratch) / "config.toml"
        config.write_text(
            f'version = 2\nroot = "{_STORE}"\nstate = "{scratch}/state"\n'
            'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
            f'[grpc]\naddress = "{socket}"\n[ttrpc]\naddress = "{scratch}/ttrpc.sock"\n'
            f'[plugins."io.containerd.internal.v1.opt"]\npath = "{scratch}/opt"\n'
        )
        with (Path(scratch) / "log").open("wb") as log:
            # mounts of its own, so that none can stay behind
            command = ["unshare", "--mount", "--propagation", "private", "containerd", "--config", str(config)]
            daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        ctr = ["ctr", "--address", socket, "--namespace", NAMESPACE]
        try:
            wait_for(
                "containerd of the seed",
                lambda: subprocess.run([*ctr, "version"], capture_output=True, check=False).returncode == 0,
                30,
            )
            yield ctr
        finally:
            daemon.terminate()
            daemon.wait(30)
        _GENERATION.write_text(str(time.time_ns()))


def images() -> set[str]:
    """References of the images in the seed, without opening it: the list is written down after each change."""
    listed = _STORE.parent / "seed-images"
    return set(listed.read_text().split()) if listed.exists() else set()


def note_images(ctr: list[str]) -> None:
    """Writes down which images the opened seed has."""
    listed = subprocess.run([*ctr, "images", "ls", "-q"], check=True, capture_output=True, text=True).stdout
    (_STORE.parent / "seed-images").write_text(listed)


def blobs(store: Path = _STORE) -> list[Path]:
    """The files of a store's content, named by their sha256."""
    return [path for path in (store / "io.containerd.content.v1.content/blobs/sha256").glob("*") if path.is_file()]


def prune(ctr: list[str], name: str, newest: list[str], keep: int) -> None:
    """Drops all but the `keep` newest images of this name; `newest` are those that come now."""
    history = _STORE.parent / f"{name}.history"
    earlier = history.read_text().split() if history.exists() else []
    every = list(dict.fromkeys([*newest, *earlier]))
    if every[keep:]:
        subprocess.run([*ctr, "images", "rm", "--sync", *every[keep:]], check=True, stdout=subprocess.DEVNULL)
    history.write_text("\n".join(every[:keep]))


def ensure_pause() -> None:
    """Builds and imports the image that holds a pod's namespaces."""
    if PAUSE in images():
        return
    with step("building the pause image"), tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch) / "pause"
        build.go_build(HERE / "pause", "-s -w", ".", program)
        with opened() as ctr:
            archive = oci.single_program(PAUSE, program)
            subprocess.run([*ctr, "images", "import", "-"], input=archive, check=True, stdout=subprocess.DEVNULL)
            note_images(ctr)


def clone_into(target: Path) -> None:
    """Makes `target` a containerd store with the seed's images; leaves one that already has just those."""
    stamp = target.parent / "seed-generation"
    with locked("seed"):
        generation = _GENERATION.read_text()
        if stamp.exists() and stamp.read_text() == generation:
            return
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-al", str(_STORE), str(target)], check=True)
        for database in _DATABASES:
            (target / database).unlink()
            shutil.copy2(_STORE / database, target / database)
        stamp.write_text(generation)


def mark_current(target: Path) -> None:
    """Says of a running node's store that it was given everything that the seed has now."""
    (target.parent / "seed-generation").write_text(_GENERATION.read_text())
