"""The base sharded over the ranks of one host, gathered without a collective.

A frozen shard never changes, so nobody has to meet anybody to read it: a rank copies the other ranks' parts of the next
layer out of their memory while the present one computes. Against FSDP2's gather that is no SM of the GPU (the copy
engines move the bytes over NVLink), no copy out of a communication buffer, and no waiting for a slower rank.

Rules: two layers are in memory, layer i in slot i % 2; bytes are readable once `seal` has returned; a rank that is gone
leaves its memory readable to those that have it open. Where ranks are on several hosts, FSDP2 gathers (sharding.py).
"""

import os
import socket
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric_memory
from torch.distributed.device_mesh import DeviceMesh
from torch.torch_version import TorchVersion

from qlora_trainer.quant import ALIGNMENT
from qlora_trainer.workclock import GATHERS

ENV_PEERS = "QLORA_PEER_GATHER"  # "0": FSDP2 gathers even on one host
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
T = TypeVar("T")
_num_rendezvous = 0  # of this process


class PeerBase:
    """All layers' bytes, every rank holding one part of each. Create it with `open_peers`.

    `shards`: of every rank its parts of all layers, one after the other, uint8, readable here. `sizes`: bytes of the
    layers. A layer's parts are equally long; the last one is padded.
    """

    def __init__(self, shards: Sequence[Tensor], sizes: Sequence[int], rank: int, mesh: DeviceMesh | None) -> None:
        self._shards, self._rank, self._mesh = shards, rank, mesh
        self._parts = [part_size(size, len(shards)) for size in sizes]
        self._starts = [sum(self._parts[:index]) for index in range(len(sizes))]
        device = shards[rank].device
        longest = max(self._parts) * len(shards)
        self._slots = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in range(2)]
        # of .data: what is saved for the backward pass may be overwritten and read again in between
        self._views = [self._slots[i % 2].data[:size] for i, size in enumerate(sizes)]
        self._held = [-1, -1]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready = [torch.cuda.Event(), torch.cuda.Event()] if self._stream else []

    @cached_property
    def uncounted_bytes(self) -> int:
        """Device memory of this rank's shard, which torch's allocator does not know of where others map it."""
        own = self._shards[self._rank]
        segments = torch.cuda.memory_snapshot() if self._stream else []
        counted = any(s["address"] <= own.data_ptr() < s["address"] + s["total_size"] for s in segments)
        return 0 if counted or not self._stream else own.nbytes

    def own(self, index: int) -> Tensor:
        """This rank's part of a layer, to be filled before `seal`."""
        start = self._starts[index]
        return self._shards[self._rank][start : start + self._parts[index]]

    def seal(self) -> None:
        """All ranks have filled their parts: from here on anybody may read them."""
        if self._stream:
            torch.cuda.synchronize()
        if self._mesh is not None:
            dist.barrier(self._mesh.get_group())

    def open(self, index: int) -> Tensor:
        """A layer's bytes, uint8, valid for what is queued on the current stream before `close`."""
        with GATHERS.waiting():
            self._fetch(index)
            if self._stream:
                torch.cuda.current_stream().wait_event(self._ready[index % 2])
        return self._views[index]

    def close(self, index: int, then: int) -> None:
        """Everything that reads the layer is queued: its slot takes the layer `then` further on (2 or -2), if any."""
        if 0 <= index + then < len(self._parts):
            with nullcontext() if self._stream else GATHERS.waiting():  # a CPU copies now
                self._fetch(index + then)

    def forget(self) -> None:
        """Read everything again when it is needed next."""
        self._held = [-1, -1]

    def _fetch(self, index: int) -> None:
        slot = index % 2
        if self._held[slot] == index:
            return
        self._held[slot] = index
        if self._stream is None:
            self._copy(index)
            return
        self._stream.wait_stream(torch.cuda.current_stream())  # whoever reads the slot's old bytes is done
        with torch.cuda.stream(self._stream):
            self._copy(index)
            self._ready[slot].record()

    def _copy(self, index: int) -> None:
        start, part, world = self._starts[index], self._parts[index], len(self._shards)
        for distance in range(1, world + 1):  # no two ranks read from the same one at a time; the own part comes last
            rank = (self._rank + distance) % world
            self._slots[index % 2][rank * part : (rank + 1) * part].copy_(self._shards[rank][start : start + part])


@dataclass(frozen=True)
class PeerLayer:
    """One layer of a PeerBase."""

    base: PeerBase
    index: int

    def open(self) -> Tensor:
        return self.base.open(self.index)

    def close(self, forward: bool) -> None:
        """The pass goes on to the next layers or, backward, to those before."""
        self.base.close(self.index, 2 if forward else -2)

    def own(self) -> Tensor:
        return self.base.own(self.index)


def part_size(size: int, world_size: int) -> int:
    """Bytes of every rank's part of a layer."""
    return -(-size // (world_size * ALIGNMENT)) * ALIGNMENT


def open_peers(sizes: Sequence[int], mesh: DeviceMesh, device: torch.device) -> PeerBase | None:
    """The base of layers of `sizes` bytes over the mesh, still empty; None where ranks can't read others' memory."""
    hosts = _all_gather(f"{socket.gethostname()} {_BOOT_ID.read_text()}" if _BOOT_ID.exists() else "", mesh)
    if len(set(hosts)) > 1 or not hosts[0] or os.environ.get(ENV_PEERS) == "0":
        return None
    length = sum(part_size(size, mesh.size()) for size in sizes)
    shards = _on_gpus(length, mesh, device) if device.type == "cuda" else _in_files(length, mesh)
    return PeerBase(shards, sizes, mesh.get_local_rank(), mesh) if shards else None


def _all_gather(value: T, mesh: DeviceMesh) -> list[T]:
    """Every rank's value."""
    values = [value] * mesh.size()
    dist.all_gather_object(values, value, mesh.get_group())
    return values


def _reach_each_other(mesh: DeviceMesh, device: torch.device) -> bool:
    """Whether every rank has a GPU of its own and sees and reaches all others'."""
    others = set(_all_gather(device.index, mesh)) - {device.index}
    seen = len(others) == mesh.size() - 1 and max(others, default=0) < torch.cuda.device_count()
    return all(_all_gather(seen and all(torch.cuda.can_device_access_peer(device, o) for o in others), mesh))


def _on_gpus(length: int, mesh: DeviceMesh, device: torch.device) -> list[Tensor] | None:
    """Each rank's shard on its GPU, mapped by the others."""
    if not _reach_each_other(mesh, device):
        return None
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # nothing here is multicast; setting it up takes time
    if TorchVersion(torch.__version__) < "2.15":
        _catch_up(mesh, device)
    own = symmetric_memory.empty(length, dtype=torch.uint8, device=device)
    handle = _rendezvous(own, mesh.get_group())
    rank = mesh.get_local_rank()
    return [own if r == rank else handle.get_buffer(r, (length,), torch.uint8) for r in range(mesh.size())]


def _rendezvous(own: Tensor, group: dist.ProcessGroup) -> Any:
    global _num_rendezvous
    _num_rendezvous += 1
    return symmetric_memory.rendezvous(own, group)


def _catch_up(mesh: DeviceMesh, device: torch.device) -> None:
    """Bring every rank to the same number of rendezvous; those behind meet themselves.

    torch before 2.15 numbers the messages of a process' rendezvous in one row, whatever the group (pytorch#196082): a
    process that went through more generations than its peers would wait for theirs for ever.
    """
    counts = _all_gather(_num_rendezvous, mesh)
    if len(set(counts)) > 1:
        alone, _ = dist.new_subgroups(1, backend="gloo")
        while _num_rendezvous < max(counts):
            _rendezvous(symmetric_memory.empty(1, dtype=torch.uint8, device=device), alone)


def _in_files(length: int, mesh: DeviceMesh) -> list[Tensor]:
    """Each rank's shard in a file without a name that the others have mapped, too."""
    with tempfile.TemporaryDirectory(prefix="shard-") as folder:
        own = torch.from_file(f"{folder}/shard", shared=True, size=length, dtype=torch.uint8)
        paths = _all_gather(f"{folder}/shard", mesh)  # all exist
        shards = [torch.from_file(path, shared=True, size=length, dtype=torch.uint8) for path in paths]
        shards[mesh.get_local_rank()] = own
        dist.barrier(mesh.get_group())  # all are open: their names may go
    return shards
