"""What a person sees of a run when things are wrong, suspended, resized or over; one operator with the chart's rights
serves all namespaces, each test has its own."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest
from hack.demo.kubectl import Kubectl
from tests.integration.operator_support import (
    RUNS,
    OperatorProcess,
    Stage,
    connect,
    eventually,
    least_rights,
    serving,
    set_stage,
)
from tests.integration.players import FakeAgent, World, container

from qlora_api.run import ExitCode, Report, Termination
from qlora_api.status import QLoRAFinetuneStatus, State
from qlora_operator.kube import ApiError, Json


@pytest.fixture(scope="module")
def operator(kubectl: Kubectl, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    folder = tmp_path_factory.mktemp("operator")
    with serving(least_rights(kubectl, folder), folder, {"BLOCKED_SECONDS": "6"}) as operator:
        yield operator


@pytest.fixture
async def stage(kubectl: Kubectl, operator: OperatorProcess) -> AsyncIterator[Stage]:
    async with set_stage(kubectl.kubeconfig, operator, "b") as made:
        yield made


def ended(code: ExitCode, message: str = "it broke") -> Termination:
    return Termination(exit_code=code, reason="X", message=message, rank=0, step=3)


async def pods(world: World) -> list[Json]:
    return list((await world.kube.request("GET", world.pods_path))["items"])


async def no_pods(world: World) -> None:
    async def gone() -> bool:
        return not await pods(world)

    await eventually(gone, "the pods' deletion")


async def ends_failed(stage: Stage, reason: str, words: str) -> QLoRAFinetuneStatus:
    """The run fails for this reason, says what to do, and frees its GPUs."""
    runs, world = stage
    status: QLoRAFinetuneStatus = await runs.reaches("r", lambda s: s.state == State.FAILED)
    found, message = runs.condition(status, "Failed")
    assert found == reason and words in message, (found, message)
    await no_pods(world)
    return status


async def test_bad_data_ends_with_file_and_line(stage: Stage) -> None:
    runs, world = stage
    error = ended(ExitCode.BAD_DATA, "train.jsonl line 3: not JSON")

    def break_it(agent: FakeAgent) -> None:
        agent.fail_with, agent.fails_warming = error, True

    world.prepare_agent = break_it
    await runs.create("r")
    status = await ends_failed(stage, "InvalidDataset", "train.jsonl line 3: not JSON")
    assert status.last_failure is not None and status.last_failure.exit_code == ExitCode.BAD_DATA


async def test_storage_out_of_reach_is_told_and_then_ends(stage: Stage) -> None:
    runs, world = stage

    def break_it(agent: FakeAgent) -> None:
        agent.fail_with, agent.fails_warming = ended(ExitCode.STORAGE, "http://s3:8333: connection refused"), True

    world.prepare_agent = break_it
    await runs.create("r")
    told = await runs.reaches("r", lambda s: runs.condition(s, "Running")[0] == "StorageUnavailable")
    assert "connection refused" in runs.condition(told, "Running")[1]
    await ends_failed(stage, "StorageUnavailable", "Check endpoint")


async def test_failures_count_until_the_limit(stage: Stage) -> None:
    runs, world = stage
    await runs.create("r", failurePolicy={"maxFailures": 1})
    await runs.reaches("r", lambda s: s.progress.step > 2)
    world.agents["r-0-0"].fail_with = ended(ExitCode.OUT_OF_MEMORY, "CUDA out of memory")
    again = await runs.reaches("r", lambda s: s.generation == 2 and s.restarts.failures == 1)
    assert again.last_failure is not None and "training.microBatchSize" in again.last_failure.message
    world.agents["r-0-0"].fail_with = ended(ExitCode.INTERNAL)
    await ends_failed(stage, "FailureLimitReached", "2 failures within 3600 s")


async def test_a_missing_secret_is_named(stage: Stage) -> None:
    runs, world = stage
    world.starts_containers = False
    await runs.create("r")

    async def bound() -> Any:
        return [pod for pod in await pods(world) if pod["spec"].get("nodeName")]

    pod = (await eventually(bound, "the pod on a node"))[0]
    keys = ("name", "namespace", "uid")
    event = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": "r-", "namespace": runs.namespace},
        "involvedObject": {"kind": "Pod", **{key: pod["metadata"][key] for key in keys}},
        "reason": "FailedMount",
        "message": 'MountVolume.SetUp failed for volume "secret-output" : secret "s3" not found',
        "type": "Warning",
    }
    await runs.kube.request("POST", f"/api/v1/namespaces/{runs.namespace}/events", body=event)
    told = await runs.reaches("r", lambda s: runs.condition(s, "Running")[0] == "MissingSecret")
    assert f"Secret s3 does not exist in namespace {runs.namespace}" in runs.condition(told, "Running")[1]
    await ends_failed(stage, "MissingSecret", "create it")


async def test_an_image_that_cannot_be_pulled_is_named(stage: Stage) -> None:
    runs, world = stage
    world.starts_containers = False
    await runs.create("r", image="nowhere/trainer:1")
    await eventually(lambda: pods(world), "the pod")
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image nowhere/trainer:1"}}
    await world.set_status("r-0-0", container(waiting))
    told = await runs.reaches("r", lambda s: runs.condition(s, "Running")[0] == "ImagePullFailed")
    assert "nowhere/trainer:1" in runs.condition(told, "Running")[1]
    await ends_failed(stage, "ImagePullFailed", "check spec.image")


async def test_a_quota_is_told_and_waited_for(stage: Stage) -> None:
    runs, world = stage
    path = f"/api/v1/namespaces/{runs.namespace}/resourcequotas"
    none: Json = {"hard": {"pods": "0"}}
    body = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": none}
    await runs.kube.request("POST", path, body=body)
    merge = "application/merge-patch+json"  # the controller's part
    status = {"status": {**none, "used": {"pods": "0"}}}
    await runs.kube.request("PATCH", f"{path}/none/status", body=status, content_type=merge)
    await asyncio.sleep(1)  # the API server's own view of quotas
    await runs.create("r")
    told = await runs.reaches("r", lambda s: runs.condition(s, "Running")[0] == "QuotaExceeded")
    assert "exceeded quota: none" in runs.condition(told, "Running")[1] and await pods(world) == []
    await runs.kube.request("DELETE", f"{path}/none")
    await runs.reaches("r", lambda s: s.state == State.RUNNING)


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        (
            {"containers": [{"name": "trainer", "resources": {"limits": {"cpu": "-1"}}}]},
            "must be greater than or equal",
        ),
        ({"hostNetwork": True}, "violates PodSecurity"),
        ({"nodeSelectors": {"pool": "spot"}}, 'unknown field "spec.nodeSelectors"'),
        ({"containers": [{"name": "trainer", "envs": []}]}, 'unknown field "spec.containers[0].envs"'),
    ],
)
async def test_a_pod_template_that_is_refused_fails_in_the_api_servers_words(
    stage: Stage, patch: Json, words: str
) -> None:
    await stage[0].create("r", podTemplate={"spec": patch})
    await ends_failed(stage, "InvalidSpec", words)
    assert stage[1].created == [], "no pod ever held a GPU"


async def test_suspend_saves_frees_the_pods_and_resume_goes_on(stage: Stage) -> None:
    runs, world = stage
    await runs.create("r", elasticPolicy={"minNodes": 1, "maxNodes": 2})
    await runs.reaches("r", lambda s: len(s.members) == 2 and s.progress.step > 2)
    await runs.patch("r", suspend=True)
    suspended = await runs.reaches("r", lambda s: s.state == State.SUSPENDED)
    await no_pods(world)
    assert suspended.nodes.desired == 0 and suspended.restarts.disruptions == suspended.restarts.failures == 0
    step = world.training.step
    await runs.patch("r", suspend=False)
    resumed = await runs.reaches("r", lambda s: s.state == State.RUNNING and s.progress.step > step)
    assert [m.pod_name for m in resumed.members] == ["r-0-1", "r-1-1"] and resumed.restarts.disruptions == 0


async def test_scaling_by_the_scale_subresource(stage: Stage) -> None:
    runs, _ = stage
    await runs.create("r", elasticPolicy={"minNodes": 1, "maxNodes": 1})
    await runs.reaches("r", lambda s: s.state == State.RUNNING)
    path, merge = f"{RUNS.format(runs.namespace)}/r/scale", "application/merge-patch+json"
    await runs.kube.request("PATCH", path, body={"spec": {"replicas": 3}}, content_type=merge)
    grown = await runs.reaches("r", lambda s: len(s.members) == 3 and s.nodes_summary == "3/3")
    assert grown.members[0].pod_name == "r-0-0"
    await runs.kube.request("PATCH", path, body={"spec": {"replicas": 1}}, content_type=merge)
    small = await runs.reaches("r", lambda s: len(s.members) == 1 and s.nodes_summary == "1/1")
    assert small.members[0].pod_name == "r-0-0" and small.restarts.disruptions == 0


async def test_a_finished_run_is_deleted_when_its_time_is_over(stage: Stage) -> None:
    runs, world = stage
    world.training.total = 5
    await runs.create("r", ttlSecondsAfterFinished=1)

    async def gone() -> bool:
        return not await runs.exists("r")

    await eventually(gone, "the run's deletion")


async def test_a_run_that_does_not_start_in_time_fails(stage: Stage) -> None:
    runs, world = stage
    world.capacity = 0
    await runs.create("r", startDeadlineSeconds=3)
    await ends_failed(stage, "StartDeadlineExceeded", "startDeadlineSeconds (3 s)")


async def test_only_a_pod_of_the_run_is_listened_to(stage: Stage, operator: OperatorProcess) -> None:
    runs, world = stage
    await runs.create("r")
    await runs.create("other")
    await runs.reaches("r", lambda s: s.state == State.RUNNING)
    pod = world.agents["r-0-0"].pod
    body = Report.model_validate({"address": "1.1.1.1", "state": "Ready"}).model_dump_json(by_alias=True)
    context = ssl.create_default_context(cafile=str(operator.certificate))

    async def post(token: str | None, run: str = "r", data: str = body) -> int:
        url = f"{operator.url}/v1/namespaces/{runs.namespace}/runs/{run}/sync"
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with (
            aiohttp.ClientSession() as session,
            session.post(url, data=data, headers=headers, ssl=context) as response,
        ):
            return response.status

    token = await world.token_of(pod)
    assert await post(token) == 200
    assert await post(token, data='{"state": "Ready"}') == 400
    assert await post(token, run="other") == 403
    assert await post(None) == 401
    assert await post("not.a.token") == 401
    assert await post(await world.token_of(pod, audience="https://kubernetes.default.svc")) == 401
    with pytest.raises(ApiError, match="401"):
        await (await connect_as(operator, token)).request("GET", world.pods_path)


async def connect_as(operator: OperatorProcess, token: str) -> Any:
    """The API server as a trainer pod would meet it: its token is of another audience."""
    config = json.loads(operator.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": token}
    path = operator.folder / "pod.kubeconfig"
    path.write_text(json.dumps(config))
    return await connect(path)
