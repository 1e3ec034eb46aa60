"""Whether this machine can carry a local cluster: said before anything is built, with what to do otherwise."""

from __future__ import annotations

import ipaddress
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from . import build
from .images import seed
from .settings import CACHE, Cluster

_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_CHROOT": 18, "CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21, "CAP_MKNOD": 27}
_BINARIES_GB = 10  # Go's caches and the binaries at their peak; 1 GB of it stays
_IMAGES_GB = 28  # buildah's store, the seed and what is in between, and those binaries
_BUILDAH_GB = 15  # buildah's part of it
ELSEWHERE = (
    "Use an existing cluster instead, the one of the current kubectl context:\n"
    "  make CLUSTER=current REGISTRY=HOST/PATH deploy\n"
    "REGISTRY is where the images are pushed to and its nodes pull from; AWS_* variables give make demo its S3 store."
)
OTHERWISE = "Install Docker (its client on the PATH, its daemon running): where this is missing, it builds the images."


def check(cluster: Cluster, only_api: bool) -> None:
    """Raises ValueError with everything that is missing for the cluster named."""
    programs, images_gb = (build.CONTROL_PLANE, 0) if only_api else (build.EVERYTHING, _IMAGES_GB)
    if missing := [*machine(), *_network(cluster), *_disk(programs, images_gb)]:
        raise ValueError(_sentence("no local cluster on this machine", missing, ELSEWHERE))


def check_images(current: bool = False) -> None:
    """The same for building the images, for the local cluster or for the current context's."""
    disk = _disk((), _BUILDAH_GB) if current else _disk(build.EVERYTHING, _IMAGES_GB)
    if missing := [*machine(), *disk]:
        raise ValueError(_sentence("no images can be built here", missing, OTHERWISE if current else ELSEWHERE))


def _sentence(what: str, missing: list[str], advice: str) -> str:
    return "\n  - ".join([f"{what}:", *missing]) + f"\n{advice}"


def machine() -> list[str]:
    """What this machine lacks for namespaces, mounts and cgroups: as a cluster's host or for buildah."""
    if platform.system() != "Linux":
        return [f"it needs Linux, this is {platform.system()}"]
    if os.geteuid() != 0:
        return ["it needs root (namespaces, mounts, cgroups): run it with sudo"]
    status = Path("/proc/self/status").read_text()
    effective = int(next(line for line in status.splitlines() if line.startswith("CapEff")).split()[1], 16)
    lacking = [name for name, bit in _CAPABILITIES.items() if not effective >> bit & 1]
    found = [f"root lacks {', '.join(lacking)} here (in a container? run it privileged)"] if lacking else []
    if "overlay" not in Path("/proc/filesystems").read_text():
        found.append("the kernel has no overlay file system")
    if not os.access("/sys/fs/cgroup", os.W_OK):
        found.append("/sys/fs/cgroup is read-only")
    return found


def _network(cluster: Cluster) -> list[str]:
    """Routes of this machine that the cluster's subnets would take away."""
    ours = [ipaddress.ip_network(net) for net in (f"{cluster.subnet}.0/24", cluster.pod_net, cluster.service_net)]
    routes = (
        subprocess.run(["ip", "-4", "route"], capture_output=True, text=True, check=False).stdout
        if shutil.which("ip")
        else ""
    )
    found = []
    for line in routes.splitlines():
        target = line.split()[0]
        if target == "default" or cluster.host_link in line:
            continue
        if any(ipaddress.ip_network(target, strict=False).overlaps(net) for net in ours):
            found.append(f"its route to {target} overlaps the cluster's subnets: another CLUSTER_NAME gets others")
    return found


def _disk(programs: Sequence[str], images_gb: int) -> list[str]:
    """Too little room for what the cache doesn't hold yet."""
    built = all(build.program(name).exists() for name in programs)
    imported = any("qlora-trainer" in image for image in seed.images())
    needed = max(0 if built else _BINARIES_GB, 0 if imported else images_gb) + 1  # one after the other
    CACHE.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(CACHE).free / 1e9
    if free >= needed:
        return []
    return [f"{CACHE} has {free:.0f} GB free and about {needed} GB are needed: set XDG_CACHE_HOME to a larger disk"]
