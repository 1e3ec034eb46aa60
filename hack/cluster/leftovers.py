"""What a cluster that is down may have left behind on the host: should always be nothing."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from . import cgroups, network
from .settings import Cluster


def find(cluster: Cluster) -> list[str]:
    """Processes, mounts, interfaces, routes, nftables rules and cgroups of the cluster, in words."""
    return [
        *_processes(cluster),
        *(f"mount {line.split()[4]}" for line in _mounts() if str(cluster.dir) in line),
        *([f"interface {cluster.host_link}"] if network.exists_on_host(cluster.host_link) else []),
        *(f"route {line}" for line in _output("ip", "route").splitlines() if f"{cluster.subnet}." in line),
        *(["nftables table kube-proxy"] if "kube-proxy" in _output("nft", "list", "tables") else []),
        *(f"cgroup {path}" for path in cgroups.left(cluster)),
    ]


def wait_until_gone(cluster: Cluster, timeout: float) -> list[str]:
    """Gives the kernel a moment to clear up; returns what is still there after it."""
    deadline = time.monotonic() + timeout
    while (left := find(cluster)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _processes(cluster: Cluster) -> list[str]:
    """Processes of the nodes and the control plane, by what they were started with or the cgroup they are in."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            groups = (entry / "cgroup").read_text()
            outer = "init.sh" in line or (entry / "ns" / "net").stat().st_ino != Path("/proc/self/ns/net").stat().st_ino
        except OSError:  # it ended meanwhile, or is none of ours to look into
            continue
        if f"/{cluster.cgroup}/" in groups or (outer and f"{cluster.dir}/" in f"{line} "):
            found.append(f"process {entry.name}: {line[:80]}")
    return found


def _mounts() -> list[str]:
    return Path("/proc/self/mountinfo").read_text().splitlines()


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout
