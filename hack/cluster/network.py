"""The wires: a bridge in the outer namespaces, a veth from each node and one from the host.

The host's end makes https://<control plane>:6443, S3, pods and services reachable from ordinary programs of the host,
and the host reachable from pods at the cluster's `host_address`. It dies with the cluster's namespaces.
"""

from __future__ import annotations

import subprocess

from .namespaces import run
from .settings import Cluster

BRIDGE = "br0"


def disconnect_host(cluster: Cluster) -> None:
    """Removes the host's link, and the routes with it: the kernel may take a minute to do so after the namespaces."""
    done = subprocess.run(["ip", "link", "delete", cluster.host_link], capture_output=True, text=True, check=False)
    if done.returncode and exists_on_host(cluster.host_link):  # the kernel may have been quicker
        raise RuntimeError(f"ip link delete {cluster.host_link}: {done.stderr.strip()}")


def _host(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def exists_on_host(link: str) -> bool:
    return subprocess.run(["ip", "link", "show", link], capture_output=True, check=False).returncode == 0


def connect_control_plane(cluster: Cluster, pid: int) -> None:
    """The bridge with the control plane's address on it, and the host's link to it."""
    disconnect_host(cluster)
    run(pid, "ip", "link", "add", BRIDGE, "type", "bridge")
    run(pid, "ip", "address", "add", f"{cluster.control_plane}/24", "dev", BRIDGE)
    run(pid, "ip", "link", "set", BRIDGE, "up")
    _host("link", "add", cluster.host_link, "type", "veth", "peer", "name", "host", "netns", str(pid))
    run(pid, "ip", "link", "set", "host", "master", BRIDGE, "up")
    _host("address", "add", f"{cluster.host_address}/24", "dev", cluster.host_link)
    _host("link", "set", cluster.host_link, "up")
    _host("route", "replace", cluster.service_net, "via", cluster.control_plane)


def connect_node(cluster: Cluster, node: int, outer: int, pid: int) -> None:
    """The node's link to the bridge, and the routes to and from its pods."""
    # the kernel takes a while to clear a killed node's namespace, and with it the other end
    run(outer, "ip", "link", "delete", f"node{node}", check=False)
    run(outer, "ip", "link", "add", f"node{node}", "type", "veth", "peer", "name", "eth0", "netns", _inside(pid))
    run(outer, "ip", "link", "set", f"node{node}", "master", BRIDGE, "up")
    run(pid, "ip", "address", "add", f"{cluster.node_address(node)}/24", "dev", "eth0")
    run(pid, "ip", "link", "set", "eth0", "up")
    run(pid, "ip", "route", "add", "default", "via", cluster.control_plane)
    for other in range(1, 6):
        if other != node:
            run(pid, "ip", "route", "add", cluster.pod_subnet(other), "via", cluster.node_address(other))
    run(outer, "ip", "route", "replace", cluster.pod_subnet(node), "via", cluster.node_address(node))
    # straight to the node, as its answers come: half of a connection through the control plane looks invalid to it
    _host("route", "replace", cluster.pod_subnet(node), "via", cluster.node_address(node))


def _inside(pid: int) -> str:
    """The process's number in its parent's process namespace, which is how `ip` run there must name it."""
    with open(f"/proc/{pid}/status") as status:
        line = next(line for line in status if line.startswith("NSpid:"))
    return line.split()[-2]


def set_link(node: int, outer: int, state: str) -> None:
    """`down` cuts the node off without a word to anybody (no FIN, no RST), `up` heals it."""
    run(outer, "ip", "link", "set", f"node{node}", state)
