"""The members' process group: joined at the start of a generation, left in order or broken off at its end.

Rules: who leaves at a step boundary leaves with all others (MembersChange); after any other error nobody is waited for.
NCCL waits for a lost peer for ever: there a thread breaks the group off when the agent says that its collectives will
not end. What they left on the GPU never counts: between the wait for a collective and whatever is kept of its result
(an optimizer step, a snapshot) stands `require_whole`. No name of a members' group comes back in a later generation.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qlora_trainer import faults, preflight
from qlora_trainer.control import WorkerEnv, read_control
from qlora_trainer.errors import LostPeer, MembersChange
from qlora_trainer.sharding import backend_of

TIMEOUT = timedelta(minutes=30)  # agents find lost peers in seconds; this is for nobody's agent
_POLL_SECONDS = 0.05
_NAMES = 100  # groups of a generation, at most


@dataclass
class Group:
    """What the ranks of a generation have in common; `mesh` is None for a single process."""

    mesh: DeviceMesh | None = None
    broken_off: threading.Event = field(default_factory=threading.Event)

    def require_whole(self) -> None:
        """After waiting for a collective: raises LostPeer when it was broken off, so that its result means nothing."""
        if self.broken_off.is_set():
            raise LostPeer("the collectives of this generation were broken off: a peer is lost")


@contextmanager
def process_group(env: WorkerEnv) -> Iterator[Group]:
    """The members' group. Raises LostPeer for whatever becomes of one that was broken off."""
    if env.device_type == "cuda":
        torch.cuda.set_device(env.local_rank)
    group, leave = Group(), _break_off
    try:
        with _watched(group, env):
            if env.world_size > 1:
                group.mesh = _join(env)
            yield group
        leave = dist.destroy_process_group
    except MembersChange:
        leave = dist.destroy_process_group
        raise
    except Exception as error:  # NCCL, CUDA and torch raise many types for one lost peer
        if group.broken_off.is_set():
            raise LostPeer(f"a peer is lost: {error}") from error
        raise
    finally:
        if dist.is_initialized():
            _leave(leave)


def _join(env: WorkerEnv) -> DeviceMesh:
    faults.reach("rendezvous")
    # Groups are named by this counter (torch 2.11 to 2.15), and symmetric memory remembers names with their stores for
    # the life of the process; all members set the same.
    dist.distributed_c10d._world.group_count = env.generation * _NAMES
    dist.init_process_group(
        backend_of(env.device_type),
        init_method=env.init_method,
        rank=env.rank,
        world_size=env.world_size,
        timeout=TIMEOUT,
    )
    preflight.check_links(env, device_of(env))
    return init_device_mesh(env.device_type, (env.world_size,))


def _break_off() -> None:
    """Leave without the others: they may be gone, and threads of this process may hang in what they have in common."""
    try:
        dist.distributed_c10d._abort_process_group()
    except (RuntimeError, ValueError):  # a backend that can't, or the watching thread was first
        if dist.is_initialized():
            dist.destroy_process_group()


def _leave(how: Callable[[], None]) -> None:
    """What goes wrong on the way out must not hide why one leaves; a group that stays lets the next join fail."""
    try:
        how()
    except (RuntimeError, ValueError) as error:
        print(f"the process group was not left in order: {error}", file=sys.stderr, flush=True)


@contextmanager
def _watched(group: Group, env: WorkerEnv) -> Iterator[None]:
    """A thread breaks the group off when the agent says so. On CPUs gloo tells of lost peers by itself."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_POLL_SECONDS):
            control = read_control(env.run_dir)
            if control.abandon and control.generation == env.generation:
                group.broken_off.set()  # first: the main thread goes on as soon as the kernels end
                _break_off()
                return

    watcher = threading.Thread(target=watch, name="group-watch", daemon=True)
    if env.device_type == "cuda" and env.world_size > 1:
        watcher.start()
    try:
        yield
    finally:
        over.set()
        if watcher.is_alive():
            watcher.join()


def device_of(env: WorkerEnv) -> torch.device:
    """This worker's device."""
    return torch.device("cuda", env.local_rank) if env.device_type == "cuda" else torch.device("cpu")


def gloo_group(env: WorkerEnv) -> tuple[dist.ProcessGroup, DeviceMesh] | tuple[None, None]:
    """A group and a mesh of CPUs of the same members, for a thread whose collectives must not mix with training's."""
    if env.world_size == 1:
        return None, None
    group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    assert isinstance(group, dist.ProcessGroup), "every rank is in it"
    return group, init_device_mesh("cpu", (env.world_size,))


def all_gather(value: Any, env: WorkerEnv) -> list[Any]:
    """Every rank's small value, by rank."""
    if env.world_size == 1:
        return [value]
    values = [None] * env.world_size
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any, source: int, env: WorkerEnv) -> Any:
    """The small value of rank `source`."""
    if env.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]
