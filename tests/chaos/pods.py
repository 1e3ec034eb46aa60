"""Pods as process groups on loopback: an agent each, on an address of its own, with its own RUN_DIR in memory."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.zygote import ForkedPod


@dataclass(eq=False)
class PodProcess:
    """One pod. Its processes share a process group; the first is the agent's PID 1."""

    name: str
    index: int
    incarnation: int
    address: str
    folder: Path
    process: subprocess.Popen[bytes] | ForkedPod
    started: float = field(default_factory=time.monotonic)
    deleting_since: float | None = None
    lost: bool = False  # its node is gone without a word: the API server still believes in it

    @property
    def uid(self) -> str:
        return f"uid-{self.name}"

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def terminate(self) -> None:
        """What the kubelet sends first."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Everything in the pod at once."""
        self._group(signal.SIGKILL)

    def freeze(self) -> None:
        """Everything in the pod stands still: what a partition or a hung machine looks like from outside."""
        self._group(signal.SIGSTOP)

    def thaw(self) -> None:
        self._group(signal.SIGCONT)

    def agent_pid(self) -> int:
        """The agent, a child of the fork server."""
        return int((self.run_dir / "agent.pid").read_text())

    def worker_pid(self, local_rank: int = 0) -> int | None:
        """A live worker's process."""
        path = self.run_dir / f"worker-{local_rank}.json"
        try:
            pid = int(json.loads(path.read_text()).get("pid", 0))
        except FileNotFoundError:
            return None
        return pid if pid and Path(f"/proc/{pid}").exists() else None

    def kill_worker(self) -> bool:
        """SIGKILL to the worker; False when there is none."""
        pid = self.worker_pid()
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        return pid is not None

    def _group(self, number: int) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass


def start_pod(
    name: str, address: str, folder: Path, config: Path, url: str, extra: dict[str, str], fork: bool
) -> PodProcess:
    """Start the agent of pod `name` (RUN-INDEX-INCARNATION) with an empty RUN_DIR; `fork`: from the zygote."""
    index, incarnation = (int(part) for part in name.rsplit("-", 2)[1:])
    if folder.exists():  # a pod of this name died before it was a member; what it traced still counts
        folder.rename(folder.with_name(f"{folder.name}.{time.monotonic_ns()}"))
    (folder / "tmp").mkdir(parents=True)
    (folder / "token").write_text(name)
    (folder / "log").touch()
    own = {
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder / "tmp"),
        "GLOO_SOCKET_IFNAME": "lo",
        "QLORA_CONFIG": str(config),
        "QLORA_TERMINATION": str(folder / "termination"),
        "QLORA_TOKEN": str(folder / "token"),
        "QLORA_RUN_DIR": str(folder / "run"),
        "QLORA_COORDINATOR": url,
        "QLORA_POD_NAME": name,
        "QLORA_POD_UID": f"uid-{name}",
        "QLORA_POD_IP": address,
        "CHAOS_LOG": str(folder / "log"),
        **extra,
    }
    if fork:
        return PodProcess(name, index, incarnation, address, folder, ForkedPod(own, folder / "log"))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "qlora_trainer.agent"],
            env={**environment, **own},
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return PodProcess(name, index, incarnation, address, folder, process)
