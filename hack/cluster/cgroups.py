"""The cgroups that the nodes' pods live in: made before the kubelet starts, removed after it is gone.

On cgroup v1 the kubelet wants its root in every hierarchy; on v2 in the one tree with the controllers handed down.
"""

from __future__ import annotations

import time
from pathlib import Path

from .settings import Cluster

_ROOT = Path("/sys/fs/cgroup")
_CONTROLLERS = ("cpu", "cpuset", "memory", "pids", "io", "hugetlb")


def _hierarchies() -> list[Path]:
    if (_ROOT / "cgroup.controllers").exists():
        return [_ROOT]
    return [path for path in _ROOT.iterdir() if path.is_dir() and not path.is_symlink()]


def make(cluster: Cluster, node: str) -> None:
    """The node's cgroup in every hierarchy."""
    for hierarchy in _hierarchies():
        if hierarchy.name == "unified":
            continue  # the hybrid mode's v2 tree has no controllers, so no kubelet asks for it; runc joins it by itself
        parent = hierarchy
        for name in (cluster.cgroup, node):
            _hand_down(parent)
            child = parent / name
            child.mkdir(exist_ok=True)
            for file in ("cpuset.cpus", "cpuset.mems"):  # v1: empty at birth, and nothing may run in it until set
                if hierarchy.name.startswith("cpuset"):
                    (child / file).write_text((parent / file).read_text())
            parent = child
        _hand_down(parent)


def _hand_down(group: Path) -> None:
    """v2 only: lets the children of this group use the controllers that it has itself."""
    if (_ROOT / "cgroup.controllers").exists():
        available = (group / "cgroup.controllers").read_text().split()
        wanted = [f"+{controller}" for controller in _CONTROLLERS if controller in available]
        (group / "cgroup.subtree_control").write_text(" ".join(wanted))


def left(cluster: Cluster, node: str = "") -> list[Path]:
    """The cluster's (or one node's) cgroups that exist, deepest first."""
    found: list[Path] = []
    for hierarchy in _hierarchies():
        top = hierarchy / cluster.cgroup / node
        if top.is_dir():
            found += [path for path in sorted(top.rglob("*"), reverse=True) if path.is_dir()] + [top]
    return found


def remove(cluster: Cluster, node: str = "", timeout: float = 10) -> None:
    """Removes them; the kernel says busy for a moment after the last process was killed."""
    deadline = time.monotonic() + timeout
    while groups := left(cluster, node):
        for group in groups:
            try:
                group.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
        time.sleep(0.1)
