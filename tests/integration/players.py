"""Who the operator talks to in its tests: a kubelet that only patches pods, and agents that speak the real HTTPS
protocol with real bound tokens and pretend to train."""

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from qlora_api.run import SYNC_PATH, TOKEN_AUDIENCE, AgentState, Command, Membership, Report, Termination
from qlora_api.status import Artifacts, CheckpointStatus, Progress
from qlora_operator.kube import ApiError, Json, Kube


@dataclass
class Training:
    """What the agents of a run pretend to do together: a step every so often, forwards only."""

    total: int = 1000
    step_seconds: float = 0.05
    step: int = 0
    advanced: float = 0.0
    generations: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)

    def tick(self) -> None:
        if time.monotonic() - self.advanced >= self.step_seconds:
            self.step, self.advanced = min(self.step + 1, self.total), time.monotonic()


@dataclass
class FakeAgent:
    """PID 1 of one pod: the real protocol, pretended work."""

    url: str
    context: ssl.SSLContext
    token: str
    pod: Json
    training: Training
    warm_seconds: float = 0.2
    wait_seconds: float = 0.2  # that a call may be held
    fail_with: Termination | None = None  # the next time its workers run, or while warming up when `fails_warming`
    fails_warming: bool = False
    state: AgentState = AgentState.WARMING
    joined: int = 0
    view: Membership = field(default_factory=Membership)
    termination: Termination | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.pod["metadata"]["name"])

    async def run(self) -> None:
        """Report until cancelled; the operator may come and go."""
        run = self.pod["metadata"]["labels"]["qlora.dev/run"]
        path = SYNC_PATH.format(namespace=self.pod["metadata"]["namespace"], name=run)
        warm_at = time.monotonic() + self.warm_seconds
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {self.token}"}) as session:
            while True:
                if self.state == AgentState.WARMING and time.monotonic() >= warm_at:
                    self._warm()
                try:
                    await self._sync(session, path)
                except (aiohttp.ClientError, TimeoutError):
                    await asyncio.sleep(0.2)

    def _warm(self) -> None:
        if self.fails_warming and self.fail_with is not None:
            self.state, self.termination = AgentState.FAILED, self.fail_with
        else:
            self.state = AgentState.READY

    async def _sync(self, session: aiohttp.ClientSession, path: str) -> None:
        report = Report(
            address="127.0.0.1",
            state=self.state,
            generation=self.joined,
            known_generation=self.view.generation,
            known_prepare=self.view.prepare,
            known_command=self.view.command,
            wait_seconds=self.wait_seconds,
            progress=Progress(step=self.training.step, total_steps=self.training.total, loss=1.0)
            if self.state in (AgentState.RUNNING, AgentState.FINISHED)
            else None,
            checkpoint=self._checkpoint(),
            termination=self.termination,
            artifacts=self._artifacts(),
            metrics={"step_seconds": self.training.step_seconds, **self.metrics},
        )
        timeout = aiohttp.ClientTimeout(total=5)
        url, body = self.url + path, report.model_dump_json(by_alias=True)
        async with session.post(url, data=body, ssl=self.context, timeout=timeout) as response:
            if response.status == 200:
                self._learn(Membership.model_validate_json(await response.read()))
            else:
                await asyncio.sleep(0.2)

    def _learn(self, view: Membership) -> None:
        """What an agent does with an answer."""
        if view.generation < self.view.generation:
            return
        self.view = view
        uids = [member.pod_uid for member in view.members]
        mine = self.pod["metadata"]["uid"]
        if view.command == Command.STOP:
            if self.state in (AgentState.READY, AgentState.RUNNING) and self.joined:
                self.termination = Termination(exit_code=80, reason="Stopped", step=self.training.step)
            return
        called = view.prepare > self.joined or mine not in uids
        if self.state == AgentState.READY and view.generation > self.joined and mine in uids:
            self.joined, self.state, self.termination = view.generation, AgentState.RUNNING, None
            self.training.generations.append((view.generation, tuple(m.pod_name for m in view.members)))
        elif called and (self.state == AgentState.RUNNING or (self.state == AgentState.FAILED and self.joined)):
            self.state = AgentState.READY
        if self.state == AgentState.RUNNING:
            self._work(uids[0] == mine)

    def _work(self, first: bool) -> None:
        if self.fail_with is not None and not self.fails_warming:
            self.state, self.termination, self.fail_with = AgentState.FAILED, self.fail_with, None
        elif self.training.step >= self.training.total:
            self.state = AgentState.FINISHED
        elif first:
            self.training.tick()

    def _checkpoint(self) -> CheckpointStatus | None:
        step = self.training.step // 10 * 10
        if self.state != AgentState.RUNNING or step == 0:
            return None
        return CheckpointStatus.model_validate({"step": step, "uri": "s3://c", "time": "2026-01-01T00:00:00Z"})

    def _artifacts(self) -> Artifacts | None:
        if self.state != AgentState.FINISHED or self.view.members[0].pod_name != self.name:
            return None
        return Artifacts(adapter_uri="s3://a/adapter", manifest_uri="s3://a/m", adapter_bytes=1, adapter_sha256="00")


@dataclass
class World:
    """The nodes of one namespace: starts an agent in every pod, ends it when the pod is deleted."""

    kube: Kube
    namespace: str
    url: str
    ca: Path
    training: Training = field(default_factory=Training)
    agents: dict[str, FakeAgent] = field(default_factory=dict)
    created: list[str] = field(default_factory=list)
    dead_nodes: set[str] = field(default_factory=set)
    capacity: int = 100  # pods that get a node
    prepare_agent: Callable[[FakeAgent], None] = lambda agent: None
    warm_seconds: float = 0.2
    wait_seconds: float = 0.2
    poll_seconds: float = 0.1
    starts_containers: bool = True
    node_of: Callable[[str], str] = lambda pod_name: f"node-{pod_name}"
    _tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _bound: set[str] = field(default_factory=set)

    @property
    def pods_path(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}/pods"

    @contextlib.asynccontextmanager
    async def playing(self) -> AsyncIterator["World"]:
        task = asyncio.create_task(self._play())
        try:
            yield self
        finally:
            for each in [task, *self._tasks.values()]:
                each.cancel()
            await asyncio.gather(task, *self._tasks.values(), return_exceptions=True)

    async def _play(self) -> None:
        while True:
            for pod in (await self.kube.request("GET", self.pods_path))["items"]:
                with contextlib.suppress(ApiError):
                    await self._tend(pod)
            await asyncio.sleep(self.poll_seconds)

    async def _tend(self, pod: Json) -> None:
        name, uid, node = pod["metadata"]["name"], pod["metadata"]["uid"], pod["spec"].get("nodeName")
        if name not in self.created:
            self.created.append(name)
        if node in self.dead_nodes:
            return
        if "deletionTimestamp" in pod["metadata"]:
            self.kill(uid)
            await self.kube.request("DELETE", f"{self.pods_path}/{name}", query={"gracePeriodSeconds": "0"})
        elif not node and len(self._bound) < self.capacity:
            await self._bind(name)
            self._bound.add(name)
        elif node and uid not in self._tasks and self.starts_containers:
            await self._start(pod)

    async def _bind(self, name: str) -> None:
        target = {"apiVersion": "v1", "kind": "Node", "name": self.node_of(name)}
        body = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": target}
        await self.kube.request("POST", f"{self.pods_path}/{name}/binding", body=body)

    async def _start(self, pod: Json) -> None:
        name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
        agent = FakeAgent(
            self.url,
            ssl.create_default_context(cafile=str(self.ca)),
            await self.token_of(pod),
            pod,
            self.training,
            self.warm_seconds,
            self.wait_seconds,
        )
        self.prepare_agent(agent)
        self.agents[name] = agent
        self._tasks[uid] = asyncio.create_task(agent.run())
        await self.set_status(name, {"phase": "Running", "podIP": "127.0.0.1", **container({"running": {}})})

    async def set_status(self, name: str, status: Json) -> None:
        path = f"{self.pods_path}/{name}/status"
        kind = "application/merge-patch+json"
        await self.kube.request("PATCH", path, body={"status": status}, content_type=kind)

    async def token_of(self, pod: Json, audience: str = TOKEN_AUDIENCE) -> str:
        """A token as the kubelet projects it: bound to the pod."""
        metadata = pod["metadata"]
        path = f"/api/v1/namespaces/{self.namespace}/serviceaccounts/{pod['spec']['serviceAccountName']}/token"
        bound = {"apiVersion": "v1", "kind": "Pod", "name": metadata["name"], "uid": metadata["uid"]}
        spec = {"audiences": [audience], "expirationSeconds": 3600, "boundObjectRef": bound}
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        return str((await self.kube.request("POST", path, body=body))["status"]["token"])

    def kill(self, uid: str) -> None:
        """End the agent of this pod; its connection breaks."""
        if task := self._tasks.get(uid):
            task.cancel()

    def kill_node_of(self, name: str) -> None:
        """The pod stays in the API as it was, whatever becomes of it."""
        agent = self.agents[name]
        self.dead_nodes.add(self.node_of(name))
        self.kill(agent.pod["metadata"]["uid"])


def container(state: Json, restarts: int = 0, last: Json | None = None) -> Json:
    """containerStatuses of a pod."""
    status = {"name": "trainer", "image": "x", "imageID": "", "ready": "running" in state, "restartCount": restarts}
    return {"containerStatuses": [{**status, "state": state, **({"lastState": last} if last else {})}]}
