"""What a cluster is called, where its files lie and which addresses it has.

Everything that two clusters side by side must not share follows from the name: the folder, the cgroup root, the
host's network interface and the subnets (through an index that is kept in the folder). Pure but for reading and
claiming that index.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora-operator"
DEFAULT_NAME = "qlora"
MAX_NODES = 5
MAX_CLUSTERS = 8  # one subnet index each


@dataclass(frozen=True)
class Timing:
    """How quickly a silent node is given up (all in seconds)."""

    grace: int  # controller manager: no lease for this long -> Unknown
    lease: int  # kubelet: life of its lease, renewed every quarter of it
    toleration: int  # API server: default for not-ready and unreachable -> eviction


STEADY = Timing(grace=12, lease=8, toleration=5)  # survives the stalls of two loaded cores
QUICK = Timing(grace=4, lease=4, toleration=1)  # for chaos tests on an otherwise idle machine


@dataclass(frozen=True)
class Cluster:
    """One local cluster: its name, its index among the clusters of this machine, and what follows from them."""

    name: str
    index: int

    @property
    def dir(self) -> Path:
        return CACHE / "clusters" / self.name

    @property
    def kubeconfig(self) -> Path:
        return self.dir / "kubeconfig"

    @property
    def cgroup(self) -> str:
        """Name of the cgroup below each hierarchy's root that everything of the nodes' pods lives in."""
        return f"qlora-{self.name}"

    @property
    def host_link(self) -> str:
        """The interface in the host's network namespace; the kernel takes 15 characters."""
        return f"qlora-host{self.index}"

    @property
    def subnet(self) -> str:
        return f"10.250.{self.index}"

    @property
    def control_plane(self) -> str:
        """Address of the API server, of CoreDNS and of S3, from the host, the nodes and the pods alike."""
        return f"{self.subnet}.1"

    @property
    def host_address(self) -> str:
        """Where pods and nodes reach processes of the host that listen on this address."""
        return f"{self.subnet}.254"

    def node_address(self, node: int) -> str:
        return f"{self.subnet}.{10 + node}"

    @property
    def pod_net(self) -> str:
        return f"10.{232 + self.index}.0.0/16"

    def pod_subnet(self, node: int) -> str:
        return f"10.{232 + self.index}.{node}.0/24"

    @property
    def service_net(self) -> str:
        return f"10.{96 + self.index}.0.0/16"

    @property
    def kubernetes_service(self) -> str:
        return f"10.{96 + self.index}.0.1"

    @property
    def dns_service(self) -> str:
        return f"10.{96 + self.index}.0.10"

    def node_dir(self, node: int) -> Path:
        return self.dir / f"node{node}"

    def known_nodes(self) -> list[int]:
        """Numbers of the nodes that have a folder, running or not."""
        found = (re.fullmatch(r"node(\d)", path.name) for path in self.dir.glob("node*"))
        return sorted(int(match.group(1)) for match in found if match)


@contextmanager
def locked(what: str) -> Iterator[None]:
    """Holds the lock of this name among all commands that use this cache."""
    (CACHE / "locks").mkdir(parents=True, exist_ok=True)
    with (CACHE / "locks" / what).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def load(name: str, claim: bool = False) -> Cluster:
    """The cluster of this name; one that is new gets the first free index, and keeps it when `claim` is set.

    Raises ValueError for a name that can't be part of a file name, when every index is taken, and when a cluster of
    another cache runs on the index.
    """
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,30}", name):
        raise ValueError(f"CLUSTER_NAME {name!r}: use lower-case letters, digits and '-', starting with a letter")
    clusters = CACHE / "clusters"
    clusters.mkdir(parents=True, exist_ok=True)
    with locked("clusters"):
        claimed = {path.parent.name: int(path.read_text()) for path in clusters.glob("*/index")}
        elsewhere = _running_elsewhere(clusters)
        if name not in claimed:
            # the first one stays with the default name, so that its addresses never change
            mine = [0] if name == DEFAULT_NAME else range(1, MAX_CLUSTERS)
            free = [index for index in mine if index not in {*claimed.values(), *(elsewhere if len(mine) > 1 else ())}]
            if not free:
                raise ValueError(f"all {MAX_CLUSTERS} local clusters are taken ({', '.join(claimed)}): take one down")
            claimed[name] = free[0]
            if claim:
                (clusters / name).mkdir(exist_ok=True)
                (clusters / name / "index").write_text(str(free[0]))
    # addresses follow from the index, cgroups from the name
    if other := next((f for i, f in elsewhere.items() if i == claimed[name] or f.name == name), None):
        raise ValueError(f"the cluster in {other} is in the way of {name}: take it down or set another CLUSTER_NAME")
    return Cluster(name, claimed[name])


def _running_elsewhere(clusters: Path) -> dict[int, Path]:
    """Index -> folder of the clusters that run here from another cache (another user's, another checkout's)."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            words = (process / "cmdline").read_text().split("\0")
            place = next((i for i, word in enumerate(words) if word.endswith("hack/cluster/init.sh")), len(words))
            if words[place + 1 : place + 2] and words[place + 1].endswith("-control-plane"):
                folder = Path(words[place + 2])
                if folder.parent != clusters:
                    found[int((folder / "index").read_text())] = folder
    return found
