"""A cluster of processes on loopback around the operator's own decisions: pods are agents, each with its address.

What is real: `qlora_operator.decide` and all below it, the agents with their fork servers and workers, the protocol
between them. What stands in: the API server (a status in memory, pods as process groups) and the HTTPS endpoint.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from qlora_api.run import Command, Membership, Report, TrainConfig
from qlora_api.status import QLoRAFinetuneStatus, State
from qlora_operator.decide import decide
from qlora_operator.settings import Settings
from qlora_operator.state import Agent, CreatePod, DeletePod, Observed, Pod, Run

TICK_SECONDS = 0.05


@dataclass
class PodProcess:
    """One pod: a process group on an address of its own."""

    name: str
    uid: str
    index: int
    incarnation: int
    address: str
    folder: Path
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)
    deleting_since: float | None = None
    unreachable: bool = False

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def signal(self, number: int) -> None:
        """To PID 1 of the pod."""
        self.process.send_signal(number)

    def kill_node(self) -> None:
        """Everything in the pod at once."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def agent_pid(self) -> int:
        """The agent itself."""
        return int((self.run_dir / "agent.pid").read_text())

    def worker_pid(self, local_rank: int = 0) -> int | None:
        path = self.run_dir / f"worker-{local_rank}.json"
        pid = json.loads(path.read_text()).get("pid") if path.exists() else None
        return int(pid) if pid and Path(f"/proc/{pid}").exists() else None


@dataclass
class _Heard:
    report: Report
    at: float
    state_since: float
    failure: Any = None
    failure_generation: int = 0
    open_calls: int = 0
    dropped_at: float | None = None


class LocalCluster:
    """Runs one TrainConfig until it is over. `capacity` is how many pods may live now."""

    def __init__(self, config: TrainConfig, folder: Path, environment: dict[str, str], settings: Settings) -> None:
        self.config, self.folder, self.settings = config, folder, settings
        self.capacity = config.spec.elastic_policy.max_nodes
        self.status = QLoRAFinetuneStatus()
        self.membership = Membership()
        self.pods: dict[str, PodProcess] = {}
        self.history: list[tuple[float, str]] = []
        self.answering = True
        self._environment = environment
        self._network = f"127.{random.randrange(1, 255)}.{random.randrange(0, 255)}"
        self._lock = threading.Condition()
        self._heard: dict[str, _Heard] = {}
        self._prepare_at: float | None = None
        self._generation_at = self._started = time.monotonic()
        self._step_at, self._num_pods, self._over = time.monotonic(), 0, False
        self._wake = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(config.model_dump_json(by_alias=True))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._threads = [
            threading.Thread(target=self._server.serve_forever, daemon=True),
            threading.Thread(target=self._loop, daemon=True),
        ]

    def __enter__(self) -> "LocalCluster":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._wake.set()
        self._threads[1].join()
        for pod in self.pods.values():
            pod.kill_node()
            pod.process.wait()
        self._server.shutdown()
        self._server.server_close()

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

    def members(self) -> list[PodProcess]:
        """Pods of the current generation, by node rank."""
        by_uid = {pod.uid: pod for pod in list(self.pods.values())}
        return [by_uid[member.pod_uid] for member in self.membership.members if member.pod_uid in by_uid]

    @property
    def is_over(self) -> bool:
        return self.status.state in (State.SUCCEEDED, State.FAILED)

    def restart_operator(self) -> None:
        """The operator forgets all that is not in status."""
        with self._lock:
            self._heard.clear()
            self._prepare_at, self._started = None, time.monotonic()
            self._generation_at = self._step_at = time.monotonic()

    # the operator's side

    def _loop(self) -> None:
        while not self._over:
            self._wake.wait(TICK_SECONDS)
            self._wake.clear()
            with self._lock:
                if not self._over and self.answering:
                    self._pass()

    def _pass(self) -> None:
        now = time.monotonic()
        observed = self._observe(now)
        decision = decide(observed, self.settings)
        old, self.status = self.membership, decision.status
        if decision.status.progress.step > observed.status.progress.step:
            self._step_at = now
        if decision.membership.generation > old.generation:
            self._generation_at = now
            names = [member.pod_name for member in decision.membership.members]
            self.note(f"generation {decision.membership.generation}: {' '.join(names)}")
        preparing = decision.membership.prepare > decision.membership.generation
        if preparing and self._prepare_at is None:
            self.note(f"prepare {decision.membership.prepare}")
        self._prepare_at = (self._prepare_at or now) if preparing else None
        self.membership = decision.membership
        for event in decision.events:
            self.note(f"event {event.reason}: {event.message[:200]}")
        for action in decision.actions:
            self._act(action, now)
        if decision.membership != old:
            self._lock.notify_all()

    def _observe(self, now: float) -> Observed:
        self._reap(now)
        run = Run(self.config.run, self.config.spec, datetime.now(UTC))
        pods = tuple(
            Pod(
                pod.name,
                pod.uid,
                pod.index,
                pod.incarnation,
                "Running",
                now - pod.started,
                pod.deleting_since is not None,
                node=f"node-{pod.index}",
            )
            for pod in self.pods.values()
        )
        return Observed(
            now=datetime.now(UTC),
            run=run,
            status=self.status,
            pods=pods,
            agents=tuple(self._agent(pod, now) for pod in self.pods.values() if pod.uid in self._heard),
            prepare_age=None if self._prepare_at is None else now - self._prepare_at,
            generation_age=now - self._generation_at,
            heard_age=now - self._started if self._heard else 0.0,
            listening_age=now - self._started,
            step_age=now - self._step_at,
        )

    def _agent(self, pod: PodProcess, now: float) -> Agent:
        heard = self._heard[pod.uid]
        dropped = None if heard.dropped_at is None else now - heard.dropped_at
        return Agent(
            pod.name,
            pod.uid,
            heard.report,
            now - heard.at,
            dropped,
            now - heard.state_since,
            heard.failure,
            heard.failure_generation,
        )

    def _reap(self, now: float) -> None:
        """What the kubelet does: an ended pod is gone, a deleted one is killed after its grace period."""
        for pod in list(self.pods.values()):
            if pod.deleting_since is not None and now - pod.deleting_since > self.settings.grace_period_seconds:
                pod.kill_node()
            if pod.process.poll() is not None and not pod.unreachable:
                self.note(f"{pod.name} ended with {pod.process.returncode}")
                del self.pods[pod.name]

    def _act(self, action: Any, now: float) -> None:
        if isinstance(action, CreatePod):
            if len(self.pods) < self.capacity and action.name not in self.pods:
                self._start_pod(action.name)
        elif isinstance(action, DeletePod) and (pod := self.pods.get(action.name)) is not None:
            if pod.deleting_since is None:
                self.note(f"{pod.name} deleted")
                pod.deleting_since = now
                pod.signal(signal.SIGTERM)

    def delete(self, pod: PodProcess) -> None:
        """kubectl delete pod."""
        with self._lock:
            self._act(DeletePod(pod.name, pod.uid), time.monotonic())
        self._wake.set()

    def _start_pod(self, name: str) -> None:
        self._num_pods += 1
        index, incarnation = (int(part) for part in name.rsplit("-", 2)[1:])
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "tmp").mkdir(parents=True)
        address, uid = f"{self._network}.{self._num_pods}", f"uid-{name}"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(folder / "tmp"),
            "GLOO_SOCKET_IFNAME": "lo",
            "QLORA_CONFIG": str(self.folder / "config.json"),
            "QLORA_TERMINATION": str(folder / "termination"),
            "QLORA_TOKEN": str(folder / "token"),
            "QLORA_RUN_DIR": str(folder / "run"),
            "QLORA_COORDINATOR": f"http://127.0.0.1:{self._server.server_port}",
            "QLORA_POD_NAME": name,
            "QLORA_POD_UID": uid,
            "QLORA_POD_IP": address,
            **self._environment,
        }
        (folder / "token").write_text(uid)
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "qlora_trainer.agent"],
                env=environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.note(f"{name} started")
        self.pods[name] = PodProcess(name, uid, index, incarnation, address, folder, process)

    # the coordinator's side

    def _answer(self, uid: str, report: Report) -> Membership | None:
        now = time.monotonic()
        with self._lock:
            if not self.answering or not any(pod.uid == uid for pod in self.pods.values()):
                return None
            known = self._heard.get(uid)
            same = known is not None and (known.report.state, known.report.generation) == (
                report.state,
                report.generation,
            )
            heard = _Heard(report, now, known.state_since if known and same else now)
            if known is not None:
                heard = replace(heard, failure=known.failure, failure_generation=known.failure_generation)
            if report.termination is not None:
                heard = replace(heard, failure=report.termination, failure_generation=report.generation)
            self._heard[uid] = heard
            self._wake.set()
            deadline = now + report.wait_seconds
            while not self._is_news(report) and (left := deadline - time.monotonic()) > 0:
                self._lock.wait(left)
            if uid in self._heard:
                self._heard[uid].at = time.monotonic()
            return self.membership if self.answering else None

    def _is_news(self, report: Report) -> bool:
        view = self.membership
        known = (report.known_generation, report.known_prepare, report.known_command)
        newer = view.generation > known[0] or view.prepare > known[1]
        return newer or (view.command != known[2] and view.command == Command.STOP)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        cluster = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                uid = self.headers.get("Authorization", "").removeprefix("Bearer ")
                try:
                    answer = cluster._answer(uid, Report.model_validate_json(body))
                    text = b"" if answer is None else answer.model_dump_json(by_alias=True).encode()
                    self.send_response(503 if answer is None else 200)
                    self.send_header("Content-Length", str(len(text)))
                    self.end_headers()
                    self.wfile.write(text)
                except OSError:
                    pass  # the caller died

            def log_message(self, *_: object) -> None:
                pass

        return Handler
