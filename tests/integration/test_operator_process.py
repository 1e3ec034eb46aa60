"""The operator as users run it, a process of its own, against a real API server; agents speak the real protocol."""

import asyncio
import signal
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
import yaml
from hack.demo.kubectl import ROOT, Kubectl
from tests.integration.operator_support import OperatorProcess, Runs, connect, eventually, least_rights
from tests.integration.players import World

from qlora_api.status import State


@pytest.fixture
async def stage(kubectl: Kubectl, tmp_path: Path) -> AsyncIterator[tuple[Runs, World, OperatorProcess]]:
    """A namespace with its nodes and a running operator that serves only it."""
    kube = await connect(kubectl.kubeconfig)
    namespace = f"t-{uuid.uuid4().hex[:8]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels}}
    await kube.request("POST", "/api/v1/namespaces", body=body)
    rights = least_rights(kubectl, tmp_path, (namespace,))
    operator = OperatorProcess(rights, tmp_path, {"NAMESPACES": namespace})
    operator.start()
    world = World(kube, namespace, operator.url, operator.certificate)
    try:
        async with world.playing():
            yield Runs(kube, namespace), world, operator
    finally:
        operator.stop()
        print(operator.log())
        await kube.close()


Stage = tuple[Runs, World, OperatorProcess]


async def test_a_run_goes_from_apply_to_adapter(stage: Stage) -> None:
    runs, world, operator = stage
    world.training.total = 60
    await runs.create("one", elasticPolicy={"minNodes": 1, "maxNodes": 2})
    running = await runs.reaches("one", lambda s: s.state == State.RUNNING)
    assert [member.pod_name for member in running.members] == ["one-0-0", "one-1-0"]
    metrics = f"http://127.0.0.1:{operator.metrics_port}/metrics"
    async with aiohttp.ClientSession() as session, session.get(metrics) as response:
        text = await response.text()
    assert f'qlora_run_members{{namespace="{runs.namespace}",run="one"}} 2.0' in text
    done = await runs.reaches("one", lambda s: s.state == State.SUCCEEDED)
    assert done.generation == 1 and done.progress.step == 60 and done.artifacts.adapter_uri == "s3://a/adapter"
    assert done.restarts.failures == done.restarts.disruptions == 0

    async def no_pods() -> bool:
        return not (await runs.kube.request("GET", world.pods_path))["items"]

    await eventually(no_pods, "the pods' deletion")
    events = (await runs.kube.request("GET", f"/api/v1/namespaces/{runs.namespace}/events"))["items"]
    assert {"Training", "MembersChanged", "AdapterUploaded"} <= {event["reason"] for event in events}


async def test_a_dead_node_is_left_out_replaced_and_let_in_again(stage: Stage) -> None:
    runs, world, _ = stage
    await runs.create("two", elasticPolicy={"minNodes": 1, "maxNodes": 2})
    await runs.reaches("two", lambda s: s.generation == 1 and s.state == State.RUNNING)
    world.kill_node_of("two-0-0")
    alone = await runs.reaches("two", lambda s: s.generation == 2)
    assert [member.pod_name for member in alone.members] == ["two-1-0"]
    both = await runs.reaches("two", lambda s: s.generation == 3)
    assert [member.pod_name for member in both.members] == ["two-1-0", "two-0-1"]
    assert both.restarts.by_reason == {"Silent": 1} and both.avoided_nodes == ["node-two-0-0"]
    stuck = await runs.kube.request("GET", f"{world.pods_path}/two-0-0")
    assert "deletionTimestamp" in stuck["metadata"], "it still hangs in Terminating and blocked nothing"


@pytest.fixture
def next_crd(kubectl: Kubectl, tmp_path: Path) -> Iterator[Path]:
    """A CRD of a later release, with a field more in spec and status; afterwards this one's is back."""
    (file,) = (ROOT / "crds").glob("*.yaml")
    crd = yaml.safe_load(file.read_text())
    parts = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    for name in ("spec", "status"):
        parts[name]["properties"]["laterField"] = {"type": "string"}
    later = tmp_path / "crd.yaml"
    later.write_text(yaml.safe_dump(crd))
    yield later
    kubectl.must("apply", "--server-side", "-f", str(file))


async def test_training_outlives_the_operator_and_an_upgrade_of_both(
    stage: Stage, kubectl: Kubectl, next_crd: Path
) -> None:
    runs, world, operator = stage
    await runs.create("three", elasticPolicy={"minNodes": 2, "maxNodes": 2})
    await runs.reaches("three", lambda s: s.generation == 1 and s.progress.step > 3)
    operator.stop(kill=True)
    step = world.training.step
    await asyncio.to_thread(kubectl.must, "apply", "--server-side", "-f", str(next_crd))
    operator.start()
    later = await runs.reaches("three", lambda s: s.progress.step > step + 5)
    assert later.generation == 1 and later.restarts.disruptions == 0


async def test_a_stalled_operator_takes_nobody_for_dead(stage: Stage) -> None:
    runs, world, operator = stage
    await runs.create("four", elasticPolicy={"minNodes": 2, "maxNodes": 2})
    await runs.reaches("four", lambda s: s.generation == 1 and s.progress.step > 3)
    assert operator.process is not None
    operator.process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(8)  # more than two leases
    operator.process.send_signal(signal.SIGCONT)
    step = world.training.step
    later = await runs.reaches("four", lambda s: s.progress.step > step + 5)
    assert later.generation == 1 and later.restarts.disruptions == 0
