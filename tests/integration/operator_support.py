"""For tests of the operator against a real API server: runs to create and watch, and the operator as a process of its
own with the chart's rights. The nodes and agents that it talks to are in players.py."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hack.demo.kubectl import ROOT, Kubectl, program
from kubernetes.aio import client, config
from tests.integration.players import World
from tests.ports import free_port

from qlora_api.status import QLoRAFinetuneStatus
from qlora_operator.kube import ApiError, Json, Kube

RUNS = "/apis/qlora.dev/v1alpha1/namespaces/{}/qlorafinetunes"
SPEC: Json = {
    "model": {"uri": "hf://org/model"},
    "dataset": {"uri": "s3://data/train.jsonl"},
    "output": {"uri": "s3://adapters/runs", "secretRef": {"name": "s3"}},
    "resourcesPerNode": {"limits": {"cpu": "1"}},
}


async def connect(kubeconfig: Path) -> Kube:
    """A client with the administrator's rights."""
    settings = client.Configuration()
    await config.load_kube_config(config_file=str(kubeconfig), client_configuration=settings)
    return Kube(client.ApiClient(settings))


Stage = tuple["Runs", World]


@contextlib.contextmanager
def serving(rights: Path, folder: Path, settings: dict[str, str]) -> Iterator["OperatorProcess"]:
    """An operator with these rights and settings; what it said is printed at the end."""
    operator = OperatorProcess(rights, folder, settings)
    operator.start()
    yield operator
    operator.stop()
    print(operator.log())


@contextlib.asynccontextmanager
async def set_stage(kubeconfig: Path, operator: "OperatorProcess", prefix: str) -> AsyncIterator[Stage]:
    """A namespace under the restricted pod security with nodes and agents, for the runs of one test."""
    kube, namespace = await connect(kubeconfig), f"{prefix}-{uuid.uuid4().hex[:8]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels}}
    await kube.request("POST", "/api/v1/namespaces", body=body)
    world = World(kube, namespace, operator.url, operator.certificate)
    async with world.playing():
        yield Runs(kube, namespace), world
    await kube.close()


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 that is its own CA."""
    key, certificate = folder / "tls.key", folder / "tls.crt"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=coordinator", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    return certificate, key


async def eventually(
    check: Callable[[], Awaitable[Any]], what: str, seconds: float = 60.0, poll_seconds: float = 0.1
) -> Any:
    """Wait until `check` answers something true."""
    end = time.monotonic() + seconds
    last: Any = None
    while time.monotonic() < end:
        with contextlib.suppress(ApiError):
            last = await check()
            if last:
                return last
        await asyncio.sleep(poll_seconds)
    raise AssertionError(f"{what} did not happen within {seconds} s; last: {last}")


@dataclass
class Runs:
    """QLoRAFinetunes of one namespace."""

    kube: Kube
    namespace: str
    poll_seconds: float = 0.1

    async def create(self, name: str, **spec: Any) -> None:
        body = {
            "apiVersion": "qlora.dev/v1alpha1",
            "kind": "QLoRAFinetune",
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": {**SPEC, **spec},
        }
        await self.kube.request("POST", RUNS.format(self.namespace), body=body)

    async def patch(self, name: str, **spec: Any) -> None:
        path, kind = f"{RUNS.format(self.namespace)}/{name}", "application/merge-patch+json"
        await self.kube.request("PATCH", path, body={"spec": spec}, content_type=kind)

    async def status(self, name: str) -> QLoRAFinetuneStatus:
        raw = await self.kube.request("GET", f"{RUNS.format(self.namespace)}/{name}")
        return QLoRAFinetuneStatus.model_validate(raw.get("status") or {})

    async def reaches(self, name: str, test: Callable[[QLoRAFinetuneStatus], Any], seconds: float = 60.0) -> Any:
        """Wait until the status passes the test; returns the status."""

        async def check() -> QLoRAFinetuneStatus | None:
            status = await self.status(name)
            return status if test(status) else None

        try:
            return await eventually(check, "the wanted status", seconds, self.poll_seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}; status: {(await self.status(name)).to_wire()}") from None

    async def exists(self, name: str) -> bool:
        try:
            await self.kube.request("GET", f"{RUNS.format(self.namespace)}/{name}")
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        return True

    def condition(self, status: QLoRAFinetuneStatus, kind: str) -> tuple[str, str]:
        """(reason, message) of a condition."""
        found = next((c for c in status.conditions if c.type == kind), None)
        return (found.reason, found.message) if found else ("", "")


def least_rights(kubectl: Kubectl, folder: Path, namespaces: tuple[str, ...] = ()) -> Path:
    """kubeconfig of a service account with exactly the rights that the chart gives the operator."""
    release = f"op-{uuid.uuid4().hex[:6]}"
    where = f"{release}-system"
    command = [program("helm"), "template", release, str(ROOT / "charts" / "qlora-operator"), "--namespace", where]
    command += [f"--set=watchNamespaces={{{','.join(namespaces)}}}"] if namespaces else []
    chosen = ["--show-only=templates/rbac.yaml", "--show-only=templates/serviceaccount.yaml"]
    text = subprocess.run([*command, *chosen], check=True, capture_output=True, text=True).stdout
    kubectl.must("create", "namespace", where)
    apply = [program("kubectl"), "apply", "-f", "-"]  # each object says its own namespace
    subprocess.run(apply, env=kubectl.environment, input=text, check=True, capture_output=True, text=True)
    accounts = json.loads(kubectl.must("--namespace", where, "get", "serviceaccounts", "-o", "json"))["items"]
    account = next(item["metadata"]["name"] for item in accounts if item["metadata"]["name"] != "default")
    token = kubectl.must("--namespace", where, "create", "token", account, "--duration=1h").strip()
    view = json.loads(kubectl.must("config", "view", "--raw", "--minify", "-o", "json"))
    view["users"] = [{"name": view["contexts"][0]["context"]["user"], "user": {"token": token}}]
    path = folder / "operator.kubeconfig"
    path.write_text(json.dumps(view))
    return path


@dataclass
class OperatorProcess:
    """`python -m qlora_operator` with its certificate."""

    kubeconfig: Path
    folder: Path
    extra: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.certificate, self.key = make_certificate(self.folder)
        self.port, self.metrics_port = free_port(), free_port()
        self.url = f"https://127.0.0.1:{self.port}"

    def start(self) -> None:
        settings = {
            "TRAINER_IMAGE": "trainer:test",
            "COORDINATOR_URL": self.url,
            "CA_FILE": str(self.certificate),
            "TLS_CERT": str(self.certificate),
            "TLS_KEY": str(self.key),
            "LISTEN_PORT": str(self.port),
            "METRICS_PORT": str(self.metrics_port),
            "LOG_FORMAT": "text",
            "SILENT_SECONDS": "4",
            "START_WAIT_SECONDS": "3",
            "GRACE_PERIOD_SECONDS": "2",
            **self.extra,
        }
        environment = {
            **os.environ,
            "KUBECONFIG": str(self.kubeconfig),
            **{f"QLORA_{name}": value for name, value in settings.items()},
        }
        log = (self.folder / "operator.log").open("ab")
        command = [sys.executable, "-m", "qlora_operator"]
        self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        log.close()

    def stop(self, kill: bool = False) -> None:
        if self.process is not None:
            self.process.kill() if kill else self.process.terminate()
            self.process.wait(30)
            self.process = None

    def log(self) -> str:
        return (self.folder / "operator.log").read_text()
