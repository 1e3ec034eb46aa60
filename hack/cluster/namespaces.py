"""Linux namespaces that stand for machines: make one, run something in it, end it.

The control plane's set (network, mounts, host name, IPC, processes) is the outer one and each node's is nested in it:
whatever kills the outer PID 1 takes the whole cluster with it, and SIGKILL of a node's PID 1 is what a spot reclaim
looks like. PID 1 is `init.sh`, which only sets the mounts up and reaps; everything else enters with nsenter. Never
`ip netns exec`: it remounts /sys, without the cgroups.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from .progress import wait_for
from .settings import HERE

_KINDS = ("--net", "--mount", "--uts", "--ipc", "--pid")


def create(folder: Path, hostname: str, binds: Sequence[str] = (), parent: int | None = None) -> int:
    """Starts init.sh as PID 1 of a new set of namespaces and returns its process id on the host.

    The id is kept in `folder`/pid1, the output in `folder`/log/init.log; `binds` are the folders (absolute) that get a
    private copy below `folder`. With `parent` the new set is nested in the one of that process.
    """
    (folder / "log").mkdir(parents=True, exist_ok=True)
    inner = ["unshare", *_KINDS, "--fork", "--mount-proc", "--propagation", "private", "--kill-child=SIGKILL"]
    command = [*enter_command(parent), *inner, "bash", str(HERE / "init.sh"), hostname, str(folder), *binds]
    ready = folder / "ready"  # written by init.sh once the mounts are set up
    ready.unlink(missing_ok=True)
    with (folder / "log" / "init.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/"
        )
    found: list[int] = []

    def is_up() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"{hostname} ended at once: see {folder / 'log' / 'init.log'}")
        found[:] = [pid for pid in descendants(process.pid) if "init.sh" in _command_line(pid) and _is_first(pid)]
        return bool(found) and ready.exists()

    wait_for(f"PID 1 of {hostname}", is_up, 20)
    (folder / "pid1").write_text(f"{found[0]} {_started(found[0])}")
    return found[0]


def find(folder: Path) -> int | None:
    """The process id of the PID 1 that `create` left in the folder, None when it is no more."""
    try:
        pid, started = (folder / "pid1").read_text().split()
    except FileNotFoundError:
        return None
    return int(pid) if _started(int(pid)) == started else None


def enter_command(pid: int | None) -> list[str]:
    """The words in front of a command that run it in the namespaces of this process; none for None."""
    return ["nsenter", "-t", str(pid), "-n", "-m", "-u", "-i", "-p", "--"] if pid else []


def run(pid: int, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a command in there and captures its output; RuntimeError with it when it fails and `check` is set."""
    done = subprocess.run([*enter_command(pid), *command], capture_output=True, text=True, cwd="/", check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done


def runs(pid: int, words: str) -> bool:
    """Whether a process in there (not in nested ones) has these words in its command line.

    Waits for the end of those that were killed: until then they look alive and hold their ports.
    """
    wait_for("the end of killed processes", lambda: not any(_is_killed(member) for member in members(pid)), 30)
    return any(f" {words} " in f" {line} " for line in members(pid).values())


def start(pid: int, command: Sequence[str | Path], log: Path, environment: Mapping[str, str]) -> None:
    """Starts a daemon in there; it lives until it ends by itself or PID 1 does."""
    # through sh -c '... &' so that the daemon is PID 1's child, which reaps it, and not ours
    shell = ["sh", "-c", 'exec "$@" </dev/null >>"$LOG" 2>&1 &', "sh", *map(str, command)]
    subprocess.run(
        [*enter_command(pid), *shell],
        env={**environment, "LOG": str(log)},
        cwd="/",
        check=True,
        start_new_session=True,
    )


def kill(pid: int) -> None:
    """SIGKILL to a PID 1: the kernel ends every process, mount and interface of its namespaces."""
    os.kill(pid, signal.SIGKILL)
    wait_for(f"end of process {pid}", lambda: _started(pid) is None, 20)


def descendants(pid: int) -> list[int]:
    """Children, grandchildren and so on, as the host numbers them."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return children + [deeper for child in children for deeper in descendants(child)]


def members(pid: int) -> dict[int, str]:
    """Every process in the process namespace of this one (not in nested ones): id on the host -> command line."""
    space = Path(f"/proc/{pid}/ns/pid").stat().st_ino
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "ns" / "pid").stat().st_ino == space:
                found[int(entry.name)] = _command_line(int(entry.name))
        except OSError:  # it ended meanwhile, or is none of ours to look into
            continue
    return found


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _is_first(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    line = next(line for line in status.splitlines() if line.startswith("NSpid:"))
    return line.split()[-1] == "1"


def _is_killed(pid: int) -> bool:
    """Whether SIGKILL is on its way to the process: true from the signal until nothing is left of it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return False
    pending = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd:", "ShdPnd:"))]
    return any(signals >> (signal.SIGKILL - 1) & 1 for signals in pending)


def _started(pid: int) -> str | None:
    """When the process started, which tells it from a later one with the same number; None for none or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[19]
