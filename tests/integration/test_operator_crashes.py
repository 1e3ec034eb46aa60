"""The operator dies after every single write that it makes while a run starts, grows, loses a node, shrinks, is made
whole and finishes: the end and the objects created are those of a run under an operator that never died."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hack.demo.kubectl import Kubectl
from tests.integration.operator_support import Runs, connect, make_certificate
from tests.integration.players import World
from tests.ports import free_port

from qlora_api.status import QLoRAFinetuneStatus, State
from qlora_operator.cluster import Cluster
from qlora_operator.kube import Json, Kube
from qlora_operator.reconcile import Reconciler
from qlora_operator.serve import Server
from qlora_operator.settings import Settings

NO_OBJECTS = ("tokenreviews", "/events")
AT_ONCE = 16


class MortalKube:
    """A client whose process stops dead after its n-th write: the write is done, nothing follows it."""

    def __init__(self, kube: Kube, writes_to_live: int | None) -> None:
        self._kube, self._left = kube, writes_to_live
        self.writes: list[str] = []
        self.died = asyncio.Event()

    async def request(self, method: str, path: str, **arguments: Any) -> Json:
        if self.died.is_set():
            await asyncio.Event().wait()
        counts = method != "GET" and not path.endswith(NO_OBJECTS)
        try:
            return await self._kube.request(method, path, **arguments)
        except asyncio.CancelledError:
            counts = False  # the history is over, and to wait here would outlive its end
            raise
        finally:
            if counts:
                self.writes.append(f"{method} {path}")
                if self._left is not None and len(self.writes) >= self._left:
                    self.died.set()
                    await asyncio.Event().wait()


@dataclass
class MortalOperator:
    """One operator after another on the same port; the first dies after so many writes."""

    kube: Kube
    settings: Settings
    writes_to_live: int | None
    writes: list[str] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def living(self) -> AsyncIterator["MortalOperator"]:
        task = asyncio.create_task(self._live())
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _live(self) -> None:
        left = self.writes_to_live
        while True:
            mortal = MortalKube(self.kube, left)
            await self._one_life(mortal)
            self.writes += mortal.writes
            left = None
            await asyncio.sleep(0.5)

    async def _one_life(self, mortal: MortalKube) -> None:
        reconciler = Reconciler(Cluster(mortal), self.settings, lambda: "")  # type: ignore[arg-type]
        server = Server(reconciler, self.settings, "127.0.0.1")
        await server.start()
        triggers = asyncio.create_task(reconciler.resync())
        try:
            await mortal.died.wait()
        finally:
            self.writes += mortal.writes if not mortal.died.is_set() else []
            triggers.cancel()
            await asyncio.gather(triggers, return_exceptions=True)
            await reconciler.stop()
            await server.stop()


@dataclass
class Outcome:
    """What a history left."""

    status: QLoRAFinetuneStatus
    created: list[str]
    writes: list[str]
    generations: list[tuple[int, tuple[str, ...]]]


async def history(kubeconfig: Path, folder: Path, writes_to_live: int | None) -> Outcome:
    """Start with one node, grow to two, lose the first, be made whole, finish."""
    kube, namespace = await connect(kubeconfig), f"c-{uuid.uuid4().hex[:8]}"
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
    await kube.request("POST", "/api/v1/namespaces", body=body)
    settings = Settings(
        "trainer:test",
        f"https://127.0.0.1:{free_port()}",
        tls_cert=str(folder / "tls.crt"),
        tls_key=str(folder / "tls.key"),
        metrics_port=free_port(),
        namespaces=(namespace,),
        start_wait_seconds=2.0,
        silent_seconds=6.0,
        grace_period_seconds=1,
        resync_seconds=0.3,
    )
    settings = Settings(**{**vars(settings), "listen_port": int(settings.coordinator_url.rsplit(":", 1)[1])})
    pace = {"wait_seconds": 1.0, "poll_seconds": 0.3}  # many histories share one process
    world = World(kube, namespace, settings.coordinator_url, folder / "tls.crt", capacity=1, **pace)
    world.training.total = 100_000
    runs, operator = Runs(kube, namespace, pace["poll_seconds"]), MortalOperator(kube, settings, writes_to_live)
    try:
        async with world.playing(), operator.living():
            await runs.create("r", elasticPolicy={"minNodes": 1, "maxNodes": 2})
            await runs.reaches("r", lambda s: len(s.members) == 1 and s.state == State.RUNNING, 120)
            world.capacity = 100
            await runs.reaches("r", lambda s: len(s.members) == 2, 120)
            world.kill_node_of("r-0-0")
            await runs.reaches("r", lambda s: [m.pod_name for m in s.members] == ["r-1-0", "r-0-1"], 120)
            world.training.step = world.training.total
            await runs.reaches("r", lambda s: s.state == State.SUCCEEDED, 120)
            await _until_pods_are_left(kube, world, {"r-0-0"})
            status = await runs.status("r")
        return Outcome(status, world.created, operator.writes, world.training.generations)
    finally:
        await kube.close()


async def _until_pods_are_left(kube: Kube, world: World, names: set[str]) -> None:
    async with asyncio.timeout(60):
        while True:
            pods = (await kube.request("GET", world.pods_path))["items"]
            if {pod["metadata"]["name"] for pod in pods} == names:
                assert all("deletionTimestamp" in pod["metadata"] for pod in pods), "the dead node's pod is deleted"
                return
            await asyncio.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(900)  # some thirty whole histories
async def test_the_operator_may_die_after_any_of_its_writes(kubectl: Kubectl, tmp_path: Path) -> None:
    assert kubectl.kubeconfig is not None
    make_certificate(tmp_path)
    reference = await history(kubectl.kubeconfig, tmp_path, None)
    assert reference.created == ["r-0-0", "r-1-0", "r-0-1"]
    assert reference.status.restarts.by_reason == {"Silent": 1} and reference.status.generation == 4
    objects = [write for write in reference.writes if "/status" not in write]
    assert sum(write.startswith("POST") for write in objects) == 3
    gate = asyncio.Semaphore(AT_ONCE)

    async def with_death_after(writes: int) -> Outcome:
        async with gate:
            return await history(kubectl.kubeconfig, tmp_path, writes)  # type: ignore[arg-type]

    kinds = {write: number for number, write in enumerate(reference.writes, 1)}
    progress_only = sum(write.endswith("/status") for write in reference.writes)
    print(f"{len(reference.writes)} writes, {progress_only} of them status, {len(kinds)} kinds")
    outcomes = await asyncio.gather(*(with_death_after(n) for n in range(1, len(reference.writes) + 1)))
    for number, outcome in enumerate(outcomes, 1):
        about = f"death after write {number}: {outcome}"
        assert sorted(outcome.created) == sorted(reference.created), about
        assert outcome.status.state == State.SUCCEEDED, about
        assert outcome.status.restarts == reference.status.restarts, about
        assert [m.pod_name for m in outcome.status.members] == ["r-1-0", "r-0-1"], about
        numbers = [generation for generation, _ in outcome.generations]
        assert numbers == sorted(numbers), about
        lists: dict[int, tuple[str, ...]] = {}
        assert all(lists.setdefault(generation, names) == names for generation, names in outcome.generations), about
