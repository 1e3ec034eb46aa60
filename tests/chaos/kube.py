"""One run on the local Kubernetes, struck by what strikes there: pods deleted, nodes killed, links cut.

The pods' processes and files are looked at from outside, through /proc: no agent of the tests runs in a pod, and what
a pod wrote last can be read after its node died, from files opened while it lived.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hack.cluster import lifecycle, namespaces, node
from hack.cluster.settings import Cluster
from hack.demo import watch
from hack.demo.kubectl import Kubectl, Manifest
from tests.chaos.cells import Cell
from tests.chaos.faultplan import FILE_NAME
from tests.chaos.timeline import Timeline

from qlora_api import names
from qlora_api.run import ENV_POD_NAME, ENV_POD_UID, RUN_DIR
from qlora_api.status import QLoRAFinetuneStatus
from qlora_trainer.control import read_worker_state

OPERATOR = ("-n", "qlora-system", "-l", "app.kubernetes.io/name=qlora-operator")
LOOK_SECONDS = 0.05
SCAN_SECONDS = 0.3


@dataclass(frozen=True)
class KubePod:
    """One pod, by its first process as this machine sees it."""

    name: str
    uid: str
    pid: int

    @property
    def run_dir(self) -> Path:
        return Path(f"/proc/{self.pid}/root{RUN_DIR}")

    def kill_worker(self) -> bool:
        """SIGKILL to the worker; False when there is none."""
        state = read_worker_state(self.run_dir, 0)
        found = [pid for pid in _same_namespace(self.pid) if state and _pids(pid)[-1:] == [state.pid]]
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        return bool(found)


class KubeCluster:
    """Follows the run of `manifest` from its application to its end. Use as a context manager."""

    def __init__(self, kubectl: Kubectl, cluster: Cluster, manifest: Manifest) -> None:
        self.kubectl, self.timeline = kubectl, Timeline()
        self.pods: dict[str, KubePod] = {}
        self.status = QLoRAFinetuneStatus()
        self._cluster, self._manifest = cluster, manifest
        self._name: str = manifest["metadata"]["name"]
        self._followed = watch.RunWatch(kubectl, self._name)
        self._size: int = manifest["spec"]["elasticPolicy"]["maxNodes"]
        self._dead, self._cut = set[int](), set[int]()
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._follow, self._look)]

    def __enter__(self) -> "KubeCluster":
        self.kubectl.delete("qft", self._name)
        self.kubectl.must("create", "-f", "-", stdin=json.dumps(self._manifest))
        self._followed.__enter__()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._followed.__exit__()
        for thread in self._threads:
            thread.join(5)
        self._mend()
        self.kubectl.delete("qft", self._name)

    def plans(self) -> list[Path]:
        """Where the workers look for scripted faults."""
        return [pod.run_dir / FILE_NAME for pod in list(self.pods.values())]

    # what the driver asks (driver.StruckCluster)

    def members(self) -> list[KubePod]:
        """Pods of the current generation, by node rank."""
        by_uid = {pod.uid: pod for pod in list(self.pods.values())}
        return [by_uid[member.pod_uid] for member in self.status.members if member.pod_uid in by_uid]

    def resize(self, size: int) -> None:
        """kubectl patch; nodes that are away come back first."""
        self._mend()
        if size != self._size:
            patch = f'{{"spec":{{"elasticPolicy":{{"maxNodes":{size}}}}}}}'
            self.kubectl.must("patch", "qft", self._name, "--type=merge", "-p", patch)
            self._size = size

    def limit(self, size: int) -> None:
        """The operator deletes what is beyond maxNodes."""

    def strike(self, cell: Cell, pods: Sequence[KubePod]) -> None:
        """Carry out the cell's fault on these pods, on all at once."""
        self.timeline.struck()
        where = {member.pod_uid: int(member.node_name.removeprefix("node")) for member in self.status.members}
        numbers = sorted({where[pod.uid] for pod in pods if pod.uid in where} - self._dead - self._cut)
        with ThreadPoolExecutor(8) as pool:
            match cell.how:
                case "SIGKILL":
                    work = [pool.submit(pod.kill_worker) for pod in pods]
                case "delete":
                    work = [pool.submit(self._delete, pod.name) for pod in pods]
                case "force delete":
                    work = [pool.submit(self._delete, pod.name, "--grace-period=0", "--force") for pod in pods]
                case "node loudly" | "node silently":
                    self._dead |= set(numbers)
                    outer, silent = lifecycle.outer_pid(self._cluster), cell.how == "node silently"
                    work = [pool.submit(node.kill, self._cluster, number, outer, silent) for number in numbers]
                case "partition":
                    self._cut |= set(numbers)
                    outer = lifecycle.outer_pid(self._cluster)
                    work = [pool.submit(node.cut, self._cluster, number, outer, "down") for number in numbers]
                case "operator, too":
                    kill = ("delete", "pod", *OPERATOR, "--grace-period=0", "--force", "--wait=false")
                    work = [pool.submit(self.kubectl.must, *kill), *(pool.submit(pod.kill_worker) for pod in pods)]
                case other:
                    raise AssertionError(f"no such fault on a cluster: {other}")
        for done in work:
            done.result()

    def restore(self, pods: Sequence[KubePod]) -> None:
        """Links are healed, nodes come back."""
        self._mend()

    def wait_for(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Until the condition holds; AssertionError after `seconds`, or when the run failed."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or self.status.state == "Failed":
                raise AssertionError(f"{what}: not within {seconds} s\n{self.describe()}")
            time.sleep(0.02)

    def describe(self) -> str:
        """What one needs to know when something went wrong."""
        pods = self.kubectl.run("get", "pods", "-o", "wide", "-l", f"{names.LABEL_RUN}={self._name}").stdout
        log = self.kubectl.run("logs", "-n", "qlora-system", "-l", OPERATOR[-1], "--tail=30").stdout
        return f"{self.status.model_dump_json(exclude_none=True)[:3000]}\n{pods}\n{log[-6000:]}"

    @property
    def is_over(self) -> bool:
        """Succeeded or failed."""
        return self.status.state in watch.TERMINAL

    # threads and details

    def _delete(self, pod: str, *flags: str) -> None:
        self.kubectl.must("delete", "pod", pod, "--wait=false", *flags)

    def _mend(self) -> None:
        for number in sorted(self._cut):
            node.cut(self._cluster, number, lifecycle.outer_pid(self._cluster), "up")
        self._cut.clear()
        for number in sorted(self._dead):
            lifecycle.start_node(self._cluster, number, fresh=False)
        self._dead.clear()

    def _follow(self) -> None:
        for state in self._followed.states(float("inf")):
            if self._closed.is_set():
                return
            self.status = QLoRAFinetuneStatus.model_validate(watch.status(state))
            self.timeline.members(self.status.generation, [member.pod_uid for member in self.status.members])

    def _look(self) -> None:
        scanned = 0.0
        while not self._closed.wait(LOOK_SECONDS):
            if time.monotonic() > scanned + SCAN_SECONDS:
                self.pods = {pod.name: pod for pod in _find_pods(f"{self._name}-")}
                scanned = time.monotonic()
            for pod in list(self.pods.values()):
                self.timeline.look(pod.run_dir)


def _find_pods(prefix: str) -> list[KubePod]:
    """The first process of every pod whose name begins so."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or _pids(int(entry.name))[-1:] != [1]:
            continue
        environment = _environment(int(entry.name))
        if environment.get(ENV_POD_NAME, "").startswith(prefix):
            found.append(KubePod(environment[ENV_POD_NAME], environment[ENV_POD_UID], int(entry.name)))
    return found


def _environment(pid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return {}
    return dict(item.split("=", 1) for item in text.split("\0") if "=" in item)


def _pids(pid: int) -> list[int]:
    """The process's id in each of its namespaces, outermost first; empty when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return []
    return [int(word) for line in lines if line.startswith("NSpid:") for word in line.split()[1:]]


def _same_namespace(pid: int) -> list[int]:
    return [pid, *namespaces.descendants(pid)]
