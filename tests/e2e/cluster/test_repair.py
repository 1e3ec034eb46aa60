"""`up` on a running cluster starts again whatever ended: each daemon of the control plane and of a node."""

from __future__ import annotations

import os
import signal

import boto3
import pytest
from hack.cluster import lifecycle, namespaces, s3
from hack.cluster.settings import Cluster
from tests.e2e.cluster.support import NAMESPACE, Kubectl, eventually, pod

pytestmark = pytest.mark.local

CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "coredns", "kube-proxy", "weed")
NODE = ("containerd", "kubelet", "kube-proxy", "plugin.py")


def daemons(inside: int, names: tuple[str, ...]) -> dict[str, int]:
    """Name -> process id of those that run in this machine; `weed` is the S3 server."""
    found = {}
    for pid, line in namespaces.members(inside).items():
        programs = {word.rpartition("/")[2] for word in line.split()[:2]}
        found.update(dict.fromkeys(programs.intersection(names), pid))
    return found


def machine(cluster: Cluster, name: str) -> int:
    found = namespaces.find(cluster.dir if name == "control-plane" else cluster.node_dir(1))
    assert found is not None
    return found


@pytest.mark.parametrize(("name", "names"), [("control-plane", CONTROL_PLANE), ("node1", NODE)])
def test_up_starts_what_died(
    cluster: Cluster, kubectl: Kubectl, pods: list[str], image: str, name: str, names: tuple[str, ...]
) -> None:
    inside = machine(cluster, name)
    before = daemons(inside, names)
    assert set(before) == set(names)
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)
    lifecycle.up(cluster, lifecycle.saved_options(cluster))
    assert machine(cluster, name) == inside, "the machine itself went on"
    after = eventually("every daemon", lambda: (found := daemons(inside, names)).keys() == before.keys() and found)
    assert not set(after.values()) & set(before.values())
    works(cluster, kubectl, pods, image, f"after-{name}")
    lifecycle.up(cluster, lifecycle.saved_options(cluster))
    assert daemons(inside, names) == after, "what runs is left alone"


def works(cluster: Cluster, kubectl: Kubectl, pods: list[str], image: str, name: str) -> None:
    """A new pod with a GPU starts on node 1, finds a Service by its name and is found; S3 takes and gives."""
    eventually("a new pod Ready", lambda: kubectl.ready_at_last(pod(name, image, 1)))
    code = f"import urllib.request as u; print(u.urlopen('http://{pods[0]}.{NAMESPACE}.svc', timeout=10).status)"
    eventually("it reaches a Service", lambda: kubectl.attempt(name, code) == "200", 30)
    kubectl("delete", "pod", name)
    settings = dict(line.split("=", 1) for line in (cluster.dir / "s3.env").read_text().split())
    client = boto3.client(
        "s3",
        endpoint_url=s3.endpoint(cluster),
        aws_access_key_id=settings["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=settings["AWS_SECRET_ACCESS_KEY"],
        region_name=settings["AWS_REGION"],
    )
    client.create_bucket(Bucket=name)
    client.put_object(Bucket=name, Key="greeting", Body=b"hello")
    assert client.get_object(Bucket=name, Key="greeting")["Body"].read() == b"hello"
    client.delete_object(Bucket=name, Key="greeting")
    client.delete_bucket(Bucket=name)


def test_coredns_may_only_look(cluster: Cluster, kubectl: Kubectl) -> None:
    login = f"--kubeconfig={cluster.dir / 'kubeconfigs' / 'coredns'}"
    assert kubectl(login, "auth", "whoami", "-o", "jsonpath={.status.userInfo.username}") == "system:coredns"
    assert kubectl(login, "auth", "can-i", "list", "services", "--all-namespaces").strip() == "yes"
    for verb, kind in (("get", "secrets"), ("create", "pods"), ("delete", "services")):
        assert kubectl.run(login, "auth", "can-i", verb, kind, "--all-namespaces").stdout.strip() == "no"
