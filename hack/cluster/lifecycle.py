"""A cluster's life: up (idempotent), down (leaves nothing behind), status, and its nodes' deaths and returns."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass

from . import build, cgroups, controlplane, deviceplugin, leftovers, namespaces, network, node, preflight, registry, s3
from .images import seed
from .progress import say, step
from .settings import MAX_NODES, QUICK, STEADY, Cluster, locked


@dataclass(frozen=True)
class Options:
    """What `up` was asked for; kept with the cluster so that a node that returns is what it was."""

    nodes: int = 2
    gpus: int = 2
    quick: bool = False
    only_api: bool = False
    node_memory_gib: float = 0  # 0: an equal share

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= MAX_NODES:
            raise ValueError(f"--nodes {self.nodes}: a local cluster has 1 to {MAX_NODES} nodes")
        if not 0 <= self.gpus <= 64:
            raise ValueError(f"--gpus {self.gpus}: between 0 and 64 devices a node")

    def for_node(self) -> node.NodeOptions:
        memory = self.node_memory_gib or node.default_memory_gib(self.nodes)
        return node.NodeOptions(self.gpus, memory, QUICK if self.quick else STEADY)


def up(cluster: Cluster, options: Options) -> None:
    """Builds what is missing and starts what doesn't run; with `only_api` just etcd and the API server."""
    preflight.check(cluster, only_api=options.only_api)
    with locked(f"cluster-{cluster.name}"), step(f"cluster {cluster.name}"):
        build.distribution_packages(build.DEBIAN)
        build.binaries(*(build.CONTROL_PLANE if options.only_api else build.EVERYTHING))
        if not options.only_api:
            s3.binary()
            deviceplugin.prepare()
            seed.ensure_pause()
        if namespaces.find(cluster.dir) and saved_options(cluster).quick != options.quick:
            say("it runs with other times of node death: they change with the next down and up")
        (cluster.dir / "options.json").write_text(json.dumps(asdict(options)))
        timing = QUICK if options.quick else STEADY
        outer = controlplane.ensure(cluster, timing, options.only_api)
        if not options.only_api:
            wanted = list(range(1, options.nodes + 1))
            for number in wanted:
                node.ensure(cluster, number, outer, options.for_node())
            node.wait_ready(cluster, wanted, outer, options.for_node())
    say(f"export KUBECONFIG={cluster.kubeconfig}")


def down(cluster: Cluster, keep: bool = False) -> None:
    """Ends everything of the cluster; its folder, S3's objects included, goes too unless `keep` is set.

    Raises RuntimeError with the list when something is left behind.
    """
    if stored := s3.buckets(cluster):
        names = ", ".join(f"{name} ({size / 1e6:.1f} MB)" for name, size in stored.items())
        kept = "stay for the next up" if keep else "go with it, adapters included; make cluster-down KEEP=1 keeps them"
        say(f"its S3 buckets {names} {kept}")
    with locked(f"cluster-{cluster.name}"), step(f"taking cluster {cluster.name} down"):
        outer = namespaces.find(cluster.dir)
        if outer is not None:
            namespaces.kill(outer)
        network.disconnect_host(cluster)
        cgroups.remove(cluster)
        left = leftovers.wait_until_gone(cluster, timeout=60)
        if left:
            raise RuntimeError("left behind: " + "; ".join(left))
        if not keep:
            shutil.rmtree(cluster.dir, ignore_errors=True)


def start_node(cluster: Cluster, number: int, fresh: bool) -> None:
    """Brings a node back, or adds one; `fresh` as a new machine with an empty disk."""
    if not 1 <= number <= MAX_NODES:
        raise ValueError(f"node {number}: nodes are numbered 1 to {MAX_NODES}")
    with locked(f"cluster-{cluster.name}"):
        outer = outer_pid(cluster)
        if fresh and namespaces.find(cluster.node_dir(number)) is None:
            node.wipe(cluster, number)
        node.ensure(cluster, number, outer, saved_options(cluster).for_node())
        node.wait_ready(cluster, [number], outer, saved_options(cluster).for_node())


def restart_node(cluster: Cluster, number: int) -> None:
    """Ends a node and brings it back at once, with the seed's images; its pods start anew on it."""
    with locked(f"cluster-{cluster.name}"):
        outer = outer_pid(cluster)
        node.kill(cluster, number, outer, silent=False)
        node.ensure(cluster, number, outer, saved_options(cluster).for_node())
        node.wait_ready(cluster, [number], outer, saved_options(cluster).for_node())


def start_registry(cluster: Cluster) -> str:
    """Starts the registry beside the cluster; returns its URL."""
    with locked(f"cluster-{cluster.name}"):
        return registry.ensure(cluster, outer_pid(cluster))


def lacking(cluster: Cluster, reference: str) -> list[int]:
    """Running nodes whose containerd doesn't know this image."""
    running = ((number, namespaces.find(cluster.node_dir(number))) for number in cluster.known_nodes())
    ask = ("ctr", "--namespace", seed.NAMESPACE, "images", "ls", "-q", f"name=={reference}")
    return [number for number, pid in running if pid and not namespaces.run(pid, *ask).stdout.strip()]


def outer_pid(cluster: Cluster) -> int:
    pid = namespaces.find(cluster.dir)
    if pid is None:
        raise ValueError(f"cluster {cluster.name} doesn't run; start it with: make cluster-up")
    return pid


def saved_options(cluster: Cluster) -> Options:
    return Options(**json.loads((cluster.dir / "options.json").read_text()))


def status(cluster: Cluster) -> dict[str, object]:
    """What runs and how to reach it."""
    outer = namespaces.find(cluster.dir)
    ready: dict[str, int] = {}
    with suppress(RuntimeError, FileNotFoundError):
        ready = node.ready_nodes(cluster) if outer else {}
    nodes = {
        f"node{number}": "not running"
        if namespaces.find(cluster.node_dir(number)) is None
        else "Ready"
        if f"node{number}" in ready
        else "not Ready"
        for number in cluster.known_nodes()
    }
    return {
        "name": cluster.name,
        "running": outer is not None,
        "nodes": nodes,
        "kubeconfig": str(cluster.kubeconfig),
        "api": f"https://{cluster.control_plane}:6443",
        "s3": s3.endpoint(cluster),
        "s3_in_pods": f"http://s3.s3.svc.cluster.local:{s3.PORT}",
        "s3_credentials": str(cluster.dir / "s3.env"),
        "host_from_pods": cluster.host_address,
    }
