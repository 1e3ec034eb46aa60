"""The endpoint over real HTTP, with a reviewer that knows two tokens."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient, TestServer
from tests.unit.operator.build import SETTINGS

from qlora_api.run import Membership
from qlora_operator.coordinator import Coordinator
from qlora_operator.state import Key, PodIdentity

KEY = Key("ns", "r")
PATH = "/v1/namespaces/ns/runs/r/sync"
TOKENS = {
    "good": PodIdentity("ns", "r-qlora", "r-0-0", "uid-0"),
    "foreign": PodIdentity("ns", "other-qlora", "other-0-0", "uid-9"),
}


class Stage:
    """A coordinator that listens, and what it asked for."""

    def __init__(self) -> None:
        self.reviews: list[str] = []
        self.woken: list[Key] = []
        self.away = False
        self.slow: asyncio.Event | None = None
        self.forgotten: set[str] = set()
        self.coordinator = Coordinator(SETTINGS, self.review, self.woken.append)

    async def review(self, token: str) -> PodIdentity | None:
        self.reviews.append(token)
        if self.away:
            raise ConnectionError("no API server")
        if self.slow is not None:
            await self.slow.wait()
        return None if token in self.forgotten else TOKENS.get(token)

    async def post(self, token: str = "good", **report: Any) -> ClientResponse:
        body = {"address": "10.0.0.1", "state": "Ready", "waitSeconds": 0, **report}
        headers = {"Authorization": f"Bearer {token}"}
        return await self.client.post(PATH, json=body, headers=headers)

    def publish(self, generation: int, prepare: int | None = None) -> None:
        answer = Membership(generation=generation, prepare=generation if prepare is None else prepare)
        self.coordinator.publish(KEY, answer, ["uid-0"])


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    stage = Stage()
    async with TestClient(TestServer(stage.coordinator.application())) as stage.client:
        yield stage


async def test_who_may_speak(stage: Stage) -> None:
    stage.publish(0)
    assert (await stage.client.post(PATH, json={})).status == 401
    assert (await stage.post("unknown")).status == 401
    assert (await stage.post("foreign")).status == 403
    assert (await stage.post(state="Dancing")).status == 400
    assert (await stage.post()).status == 200


async def test_tokens_are_reviewed_now_and_then(stage: Stage) -> None:
    stage.publish(0)
    for _ in range(5):
        await stage.post()
    assert stage.reviews == ["good"]


async def test_a_known_token_outlives_an_absent_api_server(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.publish(0)
    await stage.post()
    stage.away = True
    monkeypatch.setattr("qlora_operator.coordinator._TRUSTED_SECONDS", 0.0)
    assert (await stage.post()).status == 200
    assert (await stage.post("foreign")).status == 503


async def test_a_known_token_does_not_wait_for_its_review(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.publish(0)
    await stage.post()
    monkeypatch.setattr("qlora_operator.coordinator._TRUSTED_SECONDS", 0.0)
    stage.slow = asyncio.Event()
    async with asyncio.timeout(5):
        assert [(await stage.post()).status for _ in range(3)] == [200] * 3
    assert stage.reviews == ["good", "good"], "one at a time"
    stage.forgotten.add("good")
    stage.slow.set()
    assert 401 in [(await stage.post()).status for _ in range(50)]


async def test_an_answer_is_held_until_there_is_news(stage: Stage) -> None:
    stage.publish(1)
    held = asyncio.create_task(stage.post(knownGeneration=1, knownPrepare=1, waitSeconds=30))
    await asyncio.sleep(0.1)
    assert not held.done()
    stage.publish(1, prepare=2)
    assert (await (await held).json())["prepare"] == 2


async def test_it_is_held_a_part_of_the_lease_at_most(stage: Stage) -> None:
    stage.publish(1)
    async with asyncio.timeout(SETTINGS.lease_seconds):
        answer = await stage.post(knownGeneration=1, knownPrepare=1, waitSeconds=30)
    assert (await answer.json())["generation"] == 1


async def test_a_run_that_was_not_looked_at_yet_is_woken_and_waited_for(stage: Stage) -> None:
    held = asyncio.create_task(stage.post())
    await asyncio.sleep(0.1)
    assert stage.woken == [KEY] and not held.done()
    stage.publish(3)
    assert (await (await held).json())["generation"] == 3
    other = Coordinator(SETTINGS, stage.review, lambda _: None)
    async with TestClient(TestServer(other.application())) as stage.client:
        assert (await stage.post()).status == 503


async def test_signs_of_life_wake_nobody(stage: Stage) -> None:
    stage.publish(0)
    await stage.post()
    stage.woken.clear()
    await stage.post()
    assert stage.woken == []
    await stage.post(state="Running", generation=1)
    assert stage.woken == [KEY]


async def test_a_broken_connection_is_noted_and_wakes(stage: Stage) -> None:
    stage.publish(1)
    held = asyncio.create_task(stage.post(knownGeneration=1, knownPrepare=1, waitSeconds=30))
    await asyncio.sleep(0.1)
    stage.woken.clear()
    held.cancel()
    await asyncio.sleep(0.2)
    (agent,) = stage.coordinator.heard(KEY).agents
    assert agent.dropped is not None and stage.woken == [KEY]


async def test_whoever_asks_for_a_run_that_is_gone_is_told_to_stop(stage: Stage) -> None:
    stage.publish(1)
    held = asyncio.create_task(stage.post(knownGeneration=1, knownPrepare=1, waitSeconds=30))
    await asyncio.sleep(0.1)
    stage.coordinator.forget(KEY)
    assert (await (await held).json())["command"] == "Stop"
    stage.publish(0)
    assert (await (await stage.post()).json())["command"] == "Run"


async def test_probes(stage: Stage) -> None:
    assert (await stage.client.get("/healthz")).status == 200
    assert (await stage.client.get("/readyz")).status == 503
    stage.coordinator.ready = True
    assert (await stage.client.get("/readyz")).status == 200
