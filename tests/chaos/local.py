"""A cluster of processes on loopback around the real operator: its reconciler and coordinator, pods that are agents.

What stands in: the API server and the kubelet, by the six methods that the reconciler asks of `cluster.Cluster`.
Everything else is the product: decisions, the endpoint, agents with their fork servers and workers.
"""

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from datetime import datetime
from pathlib import Path
from typing import Any

from aiohttp import web
from tests.chaos.cells import Cell
from tests.chaos.pods import PodProcess, start_pod

from qlora_api import names
from qlora_api.run import RunIdentity, TrainConfig
from qlora_api.status import QLoRAFinetuneStatus, State
from qlora_operator.cluster import Sight
from qlora_operator.reconcile import Reconciler
from qlora_operator.settings import Settings
from qlora_operator.state import Action, CreatePod, DeletePod, Event, Key, Pod, PodIdentity, Refusal, Run, Seen

KUBELET_SECONDS = 0.02


class LocalCluster:
    """Runs one TrainConfig until it is over. `capacity` is how many pods may live now."""

    def __init__(
        self, config: TrainConfig, folder: Path, environment: dict[str, str], settings: Settings, fork: bool = False
    ) -> None:
        self.config, self.folder, self.settings = config, folder, settings
        self.capacity = config.spec.elastic_policy.max_nodes
        self.status = QLoRAFinetuneStatus()
        self.pods: dict[str, PodProcess] = {}
        self.history: list[tuple[float, str]] = []
        self.key = Key(config.run.namespace, config.run.name)
        self._environment, self._fork = environment, fork
        self._network = f"127.{random.randrange(1, 255)}.{random.randrange(0, 255)}"
        self._num_pods, self._port = 0, 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._reconciler: Reconciler | None = None
        self._runner: web.AppRunner | None = None
        self._kubelet: asyncio.Task[None] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(config.model_dump_json(by_alias=True))

    def __enter__(self) -> "LocalCluster":
        self._thread.start()
        self.start_operator()
        self._call(self._start_kubelet())
        return self

    def __exit__(self, *_: object) -> None:
        if self._kubelet is not None:
            self._loop.call_soon_threadsafe(self._kubelet.cancel)
        self.stop_operator()
        for pod in list(self.pods.values()):
            pod.kill()
            pod.process.wait()
        self._call(_cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # what a test does

    def start_operator(self) -> None:
        """A new operator process's memory, at the same address."""
        self._call(self._start_operator())

    def stop_operator(self) -> None:
        """Nobody decides or answers any more."""
        self._call(self._stop_operator())

    def delete(self, pod: PodProcess) -> None:
        """kubectl delete pod."""
        self._loop.call_soon_threadsafe(self._delete, pod)

    def wake(self) -> None:
        """As a watch event would."""
        if self._reconciler is not None:
            self._loop.call_soon_threadsafe(self._reconciler.wake, self.key)

    def patch(self, **spec: Any) -> None:
        """kubectl patch."""
        self.config = self.config.model_copy(update={"spec": self.config.spec.model_copy(update=spec)})
        self.wake()

    # what the driver asks (driver.StruckCluster)

    def resize(self, size: int) -> None:
        """So many pods may live from now on."""
        self.capacity = size
        self.wake()

    def limit(self, size: int) -> None:
        """Delete the pods beyond, the youngest first."""
        for pod in sorted(self.pods.values(), key=lambda pod: pod.started)[size:]:
            self.delete(pod)

    def strike(self, cell: Cell, pods: Sequence[PodProcess]) -> None:
        """Carry out the cell's fault on these pods."""
        if cell.world.endswith("changed"):
            self.capacity = cell.size - len(pods)
        for pod in pods:
            if cell.how == "SIGTERM":
                self.delete(pod)  # as the kubelet sends it: to a pod that is being deleted
            elif cell.how == "SIGSTOP":
                pod.freeze()
            elif cell.how == "node":
                pod.kill()
            elif not pod.kill_worker() and cell.point in ("rendezvous", "warm-up"):
                os.kill(pod.agent_pid(), signal.SIGKILL)

    def restore(self, pods: Sequence[PodProcess]) -> None:
        """What stood still goes on."""
        for pod in pods:
            pod.thaw()

    def note(self, text: str) -> None:
        self.history.append((time.time(), text))

    def wait_for(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Until the condition holds; AssertionError with the logs after `seconds`."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not within {seconds} s\n{self.describe()}")
            time.sleep(0.01)

    def describe(self) -> str:
        """What one needs to know when something went wrong."""
        lines = [f"{at:.2f} {text}" for at, text in self.history[-40:]]
        lines += [f"--- {pod.name} {pod.address}\n{pod.log[-3000:]}" for pod in self.pods.values()]
        return "\n".join([self.status.model_dump_json(exclude_none=True)[:1500], *lines])

    def metrics(self) -> str:
        """What Prometheus gets from the operator."""
        return "" if self._reconciler is None else self._reconciler.metrics.text().decode()

    def members(self) -> list[PodProcess]:
        """Pods of the current generation, by node rank."""
        by_uid = {pod.uid: pod for pod in list(self.pods.values())}
        return [by_uid[member.pod_uid] for member in self.status.members if member.pod_uid in by_uid]

    @property
    def is_over(self) -> bool:
        return self.status.state in (State.SUCCEEDED, State.FAILED)

    # what the reconciler asks of cluster.Cluster

    async def list_runs(self, namespaces: Iterable[str] = ()) -> list[Key]:
        return [self.key]

    async def observe(self, key: Key, now: datetime) -> Sight | None:
        pods = tuple(
            Pod(
                name=pod.name,
                uid=pod.uid,
                index=pod.index,
                incarnation=pod.incarnation,
                phase="Running",
                age=time.monotonic() - pod.started,
                deleting=pod.deleting_since is not None,
                node=f"node-{pod.index}",
            )
            for pod in self.pods.values()
        )
        run = Run(self.config.run, self.config.spec, now)
        return Sight(Seen(run=run, status=self.status, pods=pods), {})

    async def write_status(self, raw: Any, status: QLoRAFinetuneStatus) -> None:
        if status.generation > self.status.generation:
            self.note(f"generation {status.generation}: {' '.join(member.pod_name for member in status.members)}")
        self.status = status

    async def perform(self, key: Key, actions: Iterable[Action]) -> tuple[Refusal, ...]:
        for action in actions:
            if isinstance(action, CreatePod) and action.name not in self.pods and len(self.pods) < self.capacity:
                self._create(action.name)
            if isinstance(action, DeletePod) and action.name in self.pods:
                self._delete(self.pods[action.name])
        return ()

    async def tell(self, run: RunIdentity, events: Iterable[Event], now: datetime) -> None:
        for event in events:
            self.note(f"event {event.reason}: {event.message[:300]}")

    async def review(self, token: str) -> PodIdentity | None:
        if token not in self.pods:
            return None
        return PodIdentity(self.key.namespace, names.config_name(self.key.name), token, f"uid-{token}")

    # inside the loop

    async def _start_operator(self) -> None:
        self._reconciler = Reconciler(self, self.settings)  # type: ignore[arg-type]
        self._runner = web.AppRunner(self._reconciler.coordinator.application(), access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]
        self._reconciler.coordinator.ready = True
        self._reconciler.wake(self.key)

    async def _stop_operator(self) -> None:
        if self._reconciler is not None and self._runner is not None:
            await self._reconciler.stop()
            await self._runner.cleanup()
            self._reconciler = self._runner = None

    async def _start_kubelet(self) -> None:
        self._kubelet = asyncio.create_task(self._run_kubelet())

    async def _run_kubelet(self) -> None:
        """An ended pod is gone, a deleted one is killed after its grace period; both wake the operator."""
        while True:
            await asyncio.sleep(KUBELET_SECONDS)
            now = time.monotonic()
            for pod in list(self.pods.values()):
                if pod.deleting_since is not None and now - pod.deleting_since > self.settings.grace_period_seconds:
                    pod.kill()
                if pod.process.poll() is not None and not pod.lost:
                    self.note(f"{pod.name} ended with {pod.process.returncode}")
                    del self.pods[pod.name]
                    if self._reconciler is not None:
                        self._reconciler.wake(self.key)

    def _create(self, name: str) -> None:
        self._num_pods += 1
        address = f"{self._network}.{self._num_pods}"
        url = f"http://127.0.0.1:{self._port}"
        config = self.folder / "config.json"
        self.pods[name] = start_pod(name, address, self.folder / name, config, url, self._environment, self._fork)
        self.note(f"{name} started")

    def _delete(self, pod: PodProcess) -> None:
        if pod.deleting_since is None:
            self.note(f"{pod.name} deleted")
            pod.deleting_since = time.monotonic()
            pod.terminate()
            if self._reconciler is not None:
                self._reconciler.wake(self.key)

    def _call(self, work: Any) -> None:
        future: Future[None] = asyncio.run_coroutine_threadsafe(work, self._loop)
        future.result(30)


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
