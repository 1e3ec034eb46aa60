"""A worker node: containerd, kubelet, kube-proxy and the GPU device plugin in namespaces nested in the control plane's.

A node's disk is its folder; it outlives a kill, so a node comes back as the machine it was, or fresh as a new one.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from . import build, cgroups, controlplane, deviceplugin, namespaces, network, registry
from .images import seed
from .progress import say, step, wait_for
from .settings import Cluster, Timing

_PRIVATE = ("/var/lib/containerd", "/var/lib/kubelet", "/var/lib/cni", "/var/log/pods", "/var/log/containers")
_CNI = "/etc/cni/net.d"
# for the control plane, builds and tests beside the nodes
_RESERVED_GIB = 7
_RESTART_SECONDS = 3.0


@dataclass(frozen=True)
class NodeOptions:
    gpus: int
    memory_gib: float  # allocatable to pods
    timing: Timing


def default_memory_gib(nodes: int) -> float:
    """An equal share for each node of what the machine has beyond the part for everything else, at least 1 GiB."""
    return max(1.0, round((machine_memory_gib() - _RESERVED_GIB) / nodes, 1))


def machine_memory_gib() -> float:
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    return int(line.split()[1]) / 2**20


def ensure(cluster: Cluster, node: int, outer: int, options: NodeOptions) -> None:
    """Starts the node, or on a running one each daemon that has ended; returns before it is Ready."""
    folder = cluster.node_dir(node)
    if pid := namespaces.find(folder):
        _start_daemons(cluster, node, pid, options)
        return
    name = f"node{node}"
    with step(f"starting {name}"):
        cgroups.remove(cluster, name)
        cgroups.make(cluster, name)
        seed.clone_into(folder / "var/lib/containerd")
        pid = namespaces.create(folder, name, [*_PRIVATE, _CNI], parent=outer)
        try:
            network.connect_node(cluster, node, outer, pid)
            _configure(cluster, node, options)
            _start_daemons(cluster, node, pid, options)
        except BaseException:
            namespaces.kill(pid)  # half a node would pass for a running one
            raise


def wait_ready(cluster: Cluster, nodes: list[int], outer: int, options: NodeOptions) -> None:
    """Waits until each node is Ready and, where it has any, offers GPUs.

    A kubelet that asked containerd before that had read its images ends; like an init system this starts it again.
    """
    looked = time.monotonic()

    def are_ready() -> bool:
        nonlocal looked
        ready = ready_nodes(cluster)
        late = [n for n in nodes if f"node{n}" not in ready or (options.gpus and not ready[f"node{n}"])]
        if late and time.monotonic() > looked + _RESTART_SECONDS:
            for number in late:
                ensure(cluster, number, outer, options)
            looked = time.monotonic()
        return not late

    with step("nodes Ready"):
        wait_for("Ready nodes", are_ready, 120, poll=0.3)


def ready_nodes(cluster: Cluster) -> dict[str, int]:
    """The nodes that are Ready and how many GPUs each can give to pods."""
    listed = json.loads(controlplane.kubectl(cluster, "get", "nodes", "-o", "json"))["items"]
    return {
        item["metadata"]["name"]: int(item["status"].get("allocatable", {}).get(deviceplugin.RESOURCE, 0))
        for item in listed
        if any(c["type"] == "Ready" and c["status"] == "True" for c in item["status"].get("conditions", []))
    }


def kill(cluster: Cluster, node: int, outer: int, silent: bool) -> None:
    """Ends the node at once, as a spot reclaim does; `silent` cuts the link first, so that no peer hears of it."""
    pid = _running(cluster, node)
    if silent:
        network.set_link(node, outer, "down")
    namespaces.kill(pid)
    cgroups.remove(cluster, f"node{node}")
    say(f"node{node} killed{' silently' if silent else ''}")


def kill_kubelet(cluster: Cluster, node: int) -> None:
    """SIGKILL to the kubelet alone: the node turns NotReady while its pods go on running."""
    pid = _running(cluster, node)
    kubelet = next(m for m, line in namespaces.members(pid).items() if str(build.program("kubelet")) in line)
    namespaces.kill(kubelet)


def wipe(cluster: Cluster, node: int) -> None:
    """Forgets the disk of a node that doesn't run: it comes back as a new machine."""
    shutil.rmtree(cluster.node_dir(node), ignore_errors=True)
    controlplane.kubectl(cluster, "delete", "node", f"node{node}", "--ignore-not-found")


def _running(cluster: Cluster, node: int) -> int:
    pid = namespaces.find(cluster.node_dir(node))
    if pid is None:
        raise ValueError(f"node{node} doesn't run; start it with: node start {node}")
    return pid


def cut(cluster: Cluster, node: int, outer: int, state: str) -> None:
    """Takes the node's link down or up; the node itself goes on."""
    _running(cluster, node)
    network.set_link(node, outer, state)
    say(f"node{node}: link {state}")


def _start_daemons(cluster: Cluster, node: int, pid: int, options: NodeOptions) -> None:
    """Starts those that don't run, each known by the first two words of its command."""
    folder = cluster.node_dir(node)
    name = f"node{node}"
    environment = {"PATH": build.path_variable(), **deviceplugin.environment()}

    def start(program: str, *command: str | Path) -> None:
        if not namespaces.runs(pid, f"{command[0]} {command[1]}"):
            namespaces.start(pid, command, folder / "log" / f"{program}.log", environment)

    start("containerd", "containerd", "--config", folder / "containerd.toml")
    wait_for("containerd", lambda: namespaces.run(pid, "ctr", "version", check=False).returncode == 0, 60)
    start(
        "kubelet",
        build.program("kubelet"),
        f"--config={folder / 'kubelet.json'}",
        f"--kubeconfig={cluster.dir / 'kubeconfigs' / name}",
        f"--hostname-override={name}",
        f"--node-ip={cluster.node_address(node)}",
        f"--node-labels={deviceplugin.RESOURCE}.present=true,{deviceplugin.RESOURCE}.product=simulated",
    )
    start("kube-proxy", build.program("kube-proxy"), f"--config={controlplane.proxy_config(cluster, folder, name)}")
    start("device-plugin", *deviceplugin.command(options.gpus, folder / "unhealthy-gpus"))


def _configure(cluster: Cluster, node: int, options: NodeOptions) -> None:
    folder = cluster.node_dir(node)
    (folder / "resolv.conf").write_text("")  # pods with dnsPolicy Default: nothing to ask
    (folder / "containerd.toml").write_text(_containerd(cluster))
    (folder / "kubelet.json").write_text(json.dumps(_kubelet(cluster, node, options), indent=1))
    ranges = [[{"subnet": cluster.pod_subnet(node)}]]
    ipam = {"type": "host-local", "dataDir": "/run/cni-ipam", "ranges": ranges, "routes": [{"dst": "0.0.0.0/0"}]}
    bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipMasq": False, "hairpinMode": True, "ipam": ipam}
    ports = {"type": "portmap", "capabilities": {"portMappings": True}}
    plugins = {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge, ports]}
    (folder / _CNI.lstrip("/") / "10-pods.conflist").write_text(json.dumps(plugins, indent=1))


def _containerd(cluster: Cluster) -> str:
    """Its configuration; version 2 is read by containerd 1.6 (Debian 12) and 2.x alike."""
    return f"""version = 2
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true # root without CAP_SYS_RESOURCE can't lower it
  sandbox_image = "{seed.PAUSE}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "{registry.hosts(cluster)}" # read at every pull: a registry may be started later
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{_CNI}"
[plugins."io.containerd.internal.v1.opt"]
  path = "/run/containerd-opt"
"""


def _kubelet(cluster: Cluster, node: int, options: NodeOptions) -> dict[str, object]:
    keys = cluster.dir / "pki"
    reserved = max(0, int((machine_memory_gib() - options.memory_gib) * 1024))
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "failCgroupV1": False,
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{cluster.cgroup}/node{node}",
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(keys / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(keys / f"node{node}-server.crt"),
        "tlsPrivateKeyFile": str(keys / f"node{node}-server.key"),
        "readOnlyPort": 0,
        "failSwapOn": False,
        "maxOpenFiles": 20000,  # root without CAP_SYS_RESOURCE can't raise its limits
        "oomScoreAdj": 0,
        "enforceNodeAllocatable": ["pods"],
        # each node sees the whole machine: this leaves it its share (hard eviction's 100 MiB comes off, too)
        "systemReserved": {"memory": f"{reserved}Mi", "cpu": "200m"},
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.available": "1%",
            "imagefs.available": "1%",
            "nodefs.inodesFree": "1%",
        },
        "imageGCHighThresholdPercent": 100,  # the images were put there by hand: nothing could pull them again
        # one that was also pulled from a registry would have to be pulled again under the name that was put there
        "imagePullCredentialsVerificationPolicy": "NeverVerify",
        "clusterDNS": [cluster.dns_service],
        "clusterDomain": "cluster.local",
        "resolvConf": str(cluster.node_dir(node) / "resolv.conf"),
        "nodeStatusUpdateFrequency": "2s",
        "nodeStatusReportFrequency": "10s",
        "nodeLeaseDurationSeconds": options.timing.lease,
        "serializeImagePulls": False,
        "syncFrequency": "10s",
    }
