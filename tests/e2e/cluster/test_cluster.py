"""The local cluster itself: what pods, Services, S3, tokens and dying nodes do on it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import urllib.request
from typing import Any

import boto3
import botocore.exceptions
import pytest
from hack.cluster import lifecycle, namespaces, node, s3
from hack.cluster.settings import PROJECT, Cluster
from tests.e2e.cluster.support import NAMESPACE, Kubectl, eventually, pod

pytestmark = pytest.mark.local


def test_a_pod_gets_a_gpu_of_its_own(kubectl: Kubectl, pods: list[str]) -> None:
    for name in pods:
        assert kubectl.python(name, "import os; print(os.environ['SIMULATED_GPUS'])").startswith("gpu")
        assert kubectl.python(name, "import os; print(os.getuid())") == "65532"


def test_the_image_carries_the_working_trees_code(kubectl: Kubectl, pods: list[str]) -> None:
    code = (
        "import hashlib, json, pathlib, qlora_api, qlora_operator\n"
        "print(json.dumps({f'{m.__name__}/{f.name}': hashlib.sha256(f.read_bytes()).hexdigest()\n"
        "  for m in (qlora_api, qlora_operator) for f in pathlib.Path(m.__file__).parent.glob('*.py')}))"
    )
    folders = [PROJECT / "api/src/qlora_api", PROJECT / "operator/src/qlora_operator"]
    files = {f"{folder.name}/{file.name}": file for folder in folders for file in folder.glob("*.py")}
    expected = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
    assert json.loads(kubectl.python(pods[0], code)) == expected


def test_every_pod_reaches_every_service_by_its_name(kubectl: Kubectl, pods: list[str]) -> None:
    for source in pods:
        for target in pods:
            code = f"import urllib.request as u; print(u.urlopen('http://{target}.{NAMESPACE}.svc', timeout=10).status)"
            # a moment may pass between a pod that is Ready and rules that lead to it
            eventually(f"{source} reaches {target}", lambda: kubectl.attempt(source, code) == "200", 30)  # noqa: B023


def test_the_host_reaches_services(kubectl: Kubectl, pods: list[str]) -> None:
    def answers(address: str) -> bool:
        try:
            with urllib.request.urlopen(f"http://{address}", timeout=10) as answer:
                return answer.status == 200
        except OSError:  # every kube-proxy learns of a new Service in its own time
            return False

    for name in pods:
        address = kubectl.get("service", name)["spec"]["clusterIP"]
        eventually(f"service {name} at {address} from the host", lambda address=address: answers(address), 30)


def test_a_name_outside_is_refused(kubectl: Kubectl, pods: list[str]) -> None:
    code = "import socket\ntry: socket.getaddrinfo('no.such.example', 80)\nexcept socket.gaierror as e: print(e.errno)"
    assert kubectl.python(pods[0], code) == "-2"  # EAI_NONAME: a final no, not "try again"


def test_a_pods_token_says_who_it_is(kubectl: Kubectl, pods: list[str]) -> None:
    token = kubectl.python(pods[0], "print(open('/tokens/token').read())")
    review = {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenReview",
        "spec": {"token": token, "audiences": ["test-audience"]},
    }
    answer = json.loads(kubectl("create", "-f", "-", "-o", "json", stdin=json.dumps(review)))["status"]
    assert answer["authenticated"]
    assert answer["user"]["extra"]["authentication.kubernetes.io/pod-name"] == [pods[0]]


def test_s3_takes_its_own_key_only(cluster: Cluster, kubectl: Kubectl, pods: list[str]) -> None:
    settings = dict(line.split("=", 1) for line in (cluster.dir / "s3.env").read_text().split())
    key, secret = settings["AWS_ACCESS_KEY_ID"], settings["AWS_SECRET_ACCESS_KEY"]

    def client(endpoint: str, secret: str = secret) -> Any:
        login = {"aws_access_key_id": key, "aws_secret_access_key": secret, "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=endpoint, **login)

    host = client(settings["AWS_ENDPOINT_URL"])
    with contextlib.suppress(host.exceptions.BucketAlreadyOwnedByYou):
        host.create_bucket(Bucket="cluster-test")
    host.delete_object(Bucket="cluster-test", Key="greeting")
    host.put_object(Bucket="cluster-test", Key="greeting", Body=b"hello")
    assert host.get_object(Bucket="cluster-test", Key="greeting")["Body"].read() == b"hello"
    with pytest.raises(botocore.exceptions.ClientError, match="PreconditionFailed"):
        host.put_object(Bucket="cluster-test", Key="greeting", Body=b"again", IfNoneMatch="*")
    with pytest.raises(botocore.exceptions.ClientError, match="SignatureDoesNotMatch"):
        client(settings["AWS_ENDPOINT_URL"], "wrong").list_buckets()
    url = client(f"http://s3.s3.svc.cluster.local:{s3.PORT}").generate_presigned_url(
        "get_object", Params={"Bucket": "cluster-test", "Key": "greeting"}
    )
    read = f"import urllib.request as u; print(u.urlopen({url!r}, timeout=10).read().decode())"
    assert kubectl.python(pods[-1], read) == "hello"
    host.delete_object(Bucket="cluster-test", Key="greeting")
    host.delete_bucket(Bucket="cluster-test")


def test_an_unhealthy_gpu_is_not_allocatable(cluster: Cluster, kubectl: Kubectl) -> None:
    def allocatable() -> int:
        return int(kubectl.get("node", "node1")["status"]["allocatable"]["nvidia.com/gpu"])

    before = allocatable()
    file = cluster.node_dir(1) / "unhealthy-gpus"
    file.write_text("gpu0\n")
    try:
        eventually("one GPU less", lambda: allocatable() == before - 1)
    finally:
        file.unlink()
    eventually("the GPU back", lambda: allocatable() == before)


@pytest.mark.parametrize("silent", [False, True], ids=["loud", "silent"])
def test_a_killed_node_comes_back_with_its_pod(
    cluster: Cluster, kubectl: Kubectl, pods: list[str], image: str, silent: bool
) -> None:
    number = int(pods[-1].removeprefix("web"))
    name = f"stays-{'silent' if silent else 'loud'}"
    forever = [
        {"key": key, "operator": "Exists"} for key in ("node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready")
    ]
    # without a GPU: a kubelet that restarts refuses a pod with one ("UnexpectedAdmissionError") until the device plugin
    # is back, as real nodes do
    kubectl.create(pod(name, image, number, gpus=0, tolerations=forever))
    eventually("pod Ready", lambda: kubectl.ready(name))

    def container_id() -> str:
        return kubectl.get("pod", name)["status"]["containerStatuses"][0].get("containerID", "")

    first = container_id()
    node.kill(cluster, number, lifecycle.outer_pid(cluster), silent)
    assert namespaces.find(cluster.node_dir(number)) is None
    eventually("node given up", lambda: f"node{number}" not in node.ready_nodes(cluster))
    lifecycle.start_node(cluster, number, fresh=False)
    eventually("pod Ready again, in a new container", lambda: kubectl.ready(name) and container_id() != first)
    kubectl("delete", "pod", name)


def test_a_cut_node_is_given_up_and_heals(cluster: Cluster, pods: list[str]) -> None:
    number = int(pods[-1].removeprefix("web"))
    node.cut(cluster, number, lifecycle.outer_pid(cluster), "down")
    try:
        eventually("node given up", lambda: f"node{number}" not in node.ready_nodes(cluster))
        assert namespaces.find(cluster.node_dir(number)) is not None
    finally:
        node.cut(cluster, number, lifecycle.outer_pid(cluster), "up")
    options = lifecycle.saved_options(cluster).for_node()
    node.wait_ready(cluster, [number], lifecycle.outer_pid(cluster), options)
