"""The order of a pass and what becomes of errors, with a cluster that is a few lines long."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from tests.unit.operator.build import SETTINGS, pod, run

from qlora_api.run import RunIdentity
from qlora_api.status import QLoRAFinetuneStatus
from qlora_operator import reconcile
from qlora_operator.clock import wait_at_most
from qlora_operator.cluster import Sight
from qlora_operator.kube import ApiError
from qlora_operator.reconcile import Reconciler
from qlora_operator.state import Action, CreatePod, Event, Key, Pod, PodIdentity, Refusal, Seen

KEY = Key("ns", "r")


class FakeCluster:
    """One run; notes every call, breaks where it is told to."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.errors: dict[str, list[Exception]] = {}
        self.refusals: tuple[Refusal, ...] = ()
        self.status = QLoRAFinetuneStatus()
        self.pods: tuple[Pod, ...] = ()
        self.gone = False
        self.acted = asyncio.Event()

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if errors := self.errors.get(call):
            raise errors.pop(0)

    async def observe(self, key: Key, now: datetime) -> Sight | None:
        self._note("observe")
        seen = Seen(run=run(), status=self.status, pods=self.pods)
        return None if self.gone else Sight(seen, {})

    async def write_status(self, raw: dict[str, Any], status: QLoRAFinetuneStatus) -> None:
        self._note("status")
        self.status = status

    async def perform(self, key: Key, actions: tuple[Action, ...]) -> tuple[Refusal, ...]:
        self._note("act" if actions else "nothing")
        if not self.refusals:
            created = [pod(int(a.name.split("-")[1]), phase="Pending") for a in actions if isinstance(a, CreatePod)]
            self.pods = (*self.pods, *created)
        self.acted.set()
        return self.refusals

    async def tell(self, identity: RunIdentity, events: tuple[Event, ...], now: datetime) -> None:
        self._note("tell")

    async def review(self, token: str) -> PodIdentity | None:
        return None

    async def list_runs(self, namespaces: tuple[str, ...]) -> list[Key]:
        self._note("list")
        return [KEY]


@pytest.fixture
async def stage() -> AsyncIterator[tuple[FakeCluster, Reconciler]]:
    cluster = FakeCluster()
    reconciler = Reconciler(cluster, SETTINGS)  # type: ignore[arg-type]
    yield cluster, reconciler
    await reconciler.stop()


Stage = tuple[FakeCluster, Reconciler]


async def test_status_first_then_actions_then_events(stage: Stage) -> None:
    cluster, reconciler = stage
    await reconciler.reconcile(KEY)
    assert cluster.calls == ["observe", "status", "act", "tell"]
    cluster.calls.clear()
    await reconciler.reconcile(KEY)
    assert cluster.calls[0] == "observe" and "act" not in cluster.calls


async def test_agents_are_told_only_what_is_written(stage: Stage) -> None:
    cluster, reconciler = stage
    cluster.errors["status"] = [ApiError(409, "Conflict", "changed")]
    with pytest.raises(ApiError):
        await reconciler.reconcile(KEY)
    assert reconciler.coordinator.tables()[KEY].answer is None and "act" not in cluster.calls
    await reconciler.reconcile(KEY)
    assert reconciler.coordinator.tables()[KEY].answer is not None


async def test_a_refusal_is_shown_by_the_next_pass(stage: Stage) -> None:
    cluster, reconciler = stage
    cluster.refusals = (Refusal("r-0-0", 403, "exceeded quota: gpus"),)
    assert await reconciler.reconcile(KEY) <= reconcile.REFUSED_PAUSE
    await reconciler.reconcile(KEY)
    assert cluster.status.conditions[0].reason == "QuotaExceeded"


async def test_a_run_that_is_gone_ends_its_task(stage: Stage) -> None:
    cluster, reconciler = stage
    cluster.gone = True
    assert await reconciler.reconcile(KEY) is None
    reconciler.wake(KEY)
    (task,) = reconciler._tasks.values()
    await task
    assert reconciler._tasks == {} and reconciler._wakes == {}


async def test_wakes_coalesce(stage: Stage) -> None:
    cluster, reconciler = stage
    for _ in range(100):
        reconciler.wake(KEY)
    await cluster.acted.wait()
    await asyncio.sleep(0.05)
    assert cluster.calls.count("observe") <= 2


async def test_errors_are_tried_again(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, reconciler = stage
    monkeypatch.setattr(reconcile, "SHORTEST_PAUSE", 0.001)
    cluster.errors["observe"] = [ConnectionError("away"), TimeoutError(), ValueError("a bug")]
    cluster.errors["status"] = [ApiError(409, "Conflict", "changed")]
    reconciler.wake(KEY)
    await cluster.acted.wait()
    text = reconciler.metrics.text().decode()
    assert 'qlora_reconcile_errors_total{error="ConnectionError"} 1.0' in text
    assert 'qlora_reconcile_errors_total{error="ApiError"}' not in text, "a conflict is no error"


async def test_resync_finds_every_run_and_makes_ready(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, reconciler = stage
    monkeypatch.setattr(reconcile, "LONGEST_PAUSE", 0.01)
    cluster.errors["list"] = [ConnectionError("not yet")]
    task = asyncio.create_task(reconciler.resync())
    await cluster.acted.wait()
    task.cancel()
    assert reconciler.coordinator.ready and cluster.calls.count("list") == 2


async def test_restarts_are_counted_for_prometheus(stage: Stage) -> None:
    cluster, reconciler = stage
    await reconciler.reconcile(KEY)
    cluster.pods = (replace(cluster.pods[0], deleting=True, age=100.0), cluster.pods[1])
    await reconciler.reconcile(KEY)
    text = reconciler.metrics.text().decode()
    assert 'qlora_restarts_total{namespace="ns",reason="PodLost",run="r"} 1.0' in text


async def test_the_series_of_a_run_vanish_with_it(stage: Stage) -> None:
    cluster, reconciler = stage
    await reconciler.reconcile(KEY)
    cluster.pods = (replace(cluster.pods[0], deleting=True, age=100.0), cluster.pods[1])
    await reconciler.reconcile(KEY)
    reconciler.metrics.restarts.labels("ns", "other", "PodLost").inc()
    cluster.gone = True
    await reconciler.reconcile(KEY)
    text = reconciler.metrics.text().decode()
    assert 'run="r"' not in text and 'run="other"' in text


async def test_stopping_ends_a_run_that_is_woken_at_the_same_moment(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, reconciler = stage
    waits = asyncio.Event()

    async def wait(event: asyncio.Event, seconds: float) -> None:
        waits.set()
        await wait_at_most(event, seconds)

    monkeypatch.setattr(reconcile, "wait_at_most", wait)
    reconciler.wake(KEY)
    async with asyncio.timeout(5):
        await waits.wait()
    assert cluster.calls == ["observe", "status", "act", "tell"], "a pass is over, the next is waited for"
    reconciler.wake(KEY)
    async with asyncio.timeout(5):
        await reconciler.stop()
