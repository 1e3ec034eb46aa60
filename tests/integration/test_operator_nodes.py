"""What a person sees of nodes that are at fault or slow: on a real API server, in its events, and in the metrics."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest
from hack.demo.kubectl import Kubectl
from tests.integration.operator_support import (
    OperatorProcess,
    Runs,
    Stage,
    eventually,
    least_rights,
    serving,
    set_stage,
)
from tests.integration.players import FakeAgent

from qlora_api.run import METRIC_STEP_WORK, ExitCode, Termination
from qlora_api.status import State
from qlora_operator.kube import Json

AVOID_SECONDS = 12


@pytest.fixture(scope="module")
def operator(kubectl: Kubectl, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    folder = tmp_path_factory.mktemp("operator")
    with serving(least_rights(kubectl, folder), folder, {"AVOID_SECONDS": str(AVOID_SECONDS)}) as operator:
        yield operator


@pytest.fixture
async def stage(kubectl: Kubectl, operator: OperatorProcess) -> AsyncIterator[Stage]:
    async with set_stage(kubectl.kubeconfig, operator, "n") as made:
        yield made


async def event(runs: Runs, reason: str) -> Json:
    """The run's event of this reason, once it is there."""

    async def find() -> Any:
        found = await runs.kube.request("GET", f"/apis/events.k8s.io/v1/namespaces/{runs.namespace}/events")
        return [item for item in found["items"] if item["reason"] == reason]

    (found,) = await eventually(find, f"an event {reason}")
    return dict(found)


async def test_a_straggler_is_told_and_its_recovery(stage: Stage, operator: OperatorProcess) -> None:
    runs, world = stage
    await runs.create("r", elasticPolicy={"minNodes": 2, "maxNodes": 2})
    await runs.reaches("r", lambda s: s.state == State.RUNNING and len(s.members) == 2)
    for name, seconds in (("r-0-0", 0.4), ("r-1-0", 1.0)):
        world.agents[name].metrics = {METRIC_STEP_WORK: seconds}
    status = await runs.reaches("r", lambda s: s.stragglers)
    (straggler,) = status.stragglers
    assert (straggler.pod_name, straggler.node_name, straggler.ratio) == ("r-1-0", "node-r-1-0", 2.5)
    told = await event(runs, "Straggler")
    assert told["type"] == "Warning" and told["note"].startswith("r-1-0 on node node-r-1-0 works 2.5 times as long")
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{operator.metrics_port}/metrics") as answer,
    ):
        text = await answer.text()
    labels = f'namespace="{runs.namespace}",pod="r-1-0",run="r"'
    assert f"qlora_trainer_step_work_seconds{{{labels}}} 1.0" in text
    world.agents["r-1-0"].metrics = {METRIC_STEP_WORK: 0.42}
    after = await runs.reaches("r", lambda s: not s.stragglers)
    assert after.generation == status.generation and after.restarts == status.restarts, "nothing was done about it"
    assert (await event(runs, "StragglerRecovered"))["type"] == "Normal"


async def test_a_node_with_two_faults_is_avoided_for_a_while(stage: Stage) -> None:
    """Both pods of the place come to the same node; the third is told to prefer others, and later ones no more."""
    runs, world = stage
    world.node_of = lambda _: "node-a"
    fault = Termination(exit_code=ExitCode.FAULTY_NODE, reason="FaultyNode", message="7 words of memory are wrong.")

    def break_two(agent: FakeAgent) -> None:
        if agent.name in ("r-0-0", "r-0-1"):
            agent.fail_with, agent.fails_warming = fault, True

    world.prepare_agent = break_two
    await runs.create("r")
    status = await runs.reaches("r", lambda s: s.state == State.RUNNING and s.avoided_nodes)
    assert status.avoided_nodes == ["node-a"] and status.restarts.by_reason == {"FaultyNode": 2}
    assert "on node-a for want of other nodes" in runs.condition(status, "Running")[1]
    told = await event(runs, "NodeAvoided")
    assert told["type"] == "Warning" and "node node-a was at fault" in told["note"]
    pod = await runs.kube.request("GET", f"{world.pods_path}/r-0-2")
    affinity = pod["spec"]["affinity"]["nodeAffinity"]
    assert "requiredDuringSchedulingIgnoredDuringExecution" not in affinity
    (wish,) = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
    assert wish["preference"]["matchExpressions"][0]["values"] == ["node-a"]
    forgiven = await runs.reaches("r", lambda s: not s.avoided_nodes)
    assert forgiven.avoided_until == {} and "node-a" not in runs.condition(forgiven, "Running")[1]
    await event(runs, "NodeForgiven")
