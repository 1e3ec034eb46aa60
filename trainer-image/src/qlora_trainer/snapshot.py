"""The memory tier: after every step the trainable state goes into one of two slots on a memory volume.

Rules:
* A slot is `header | table | payload`. Writing goes: invalidate the header, payload, table, header last. Whoever is
  killed in between leaves a slot whose header is void; the other slot still holds the step before.
* The header carries its own checksum and one of table and payload. `newest()` verifies the newer slot's, and the older
  slot's only if that one is damaged.
* The slots outlive the process (tmpfs), not the pod. One writer a pod: local rank 0.
* The caller may change the state again after `wait()`: then the snapshot counts. With `wait()` before the next
  optimizer step at most one completed step is ever lost.
"""

import json
import mmap
import os
import struct
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from qlora_trainer import faults
from qlora_trainer.errors import OutOfMemory

_MAGIC = b"QLORASN1"
_HEADER = struct.Struct("<8sQQQQ16s")  # magic, step, generation, bytes of table, bytes of payload, digest of both
_HEADER_BYTES = 4096
_ALIGN = 64  # bytes; tensors start on a cache line
_PAGE = 4096
_VOID = (-1, -1)  # step and generation of a slot that is empty, half written or damaged


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class _Layout:
    """Where each tensor lies in the payload; equal for every step of a run."""

    entries: tuple[_Entry, ...]
    num_bytes: int

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "_Layout":
        entries, offset = [], 0
        for name, tensor in state.items():
            num_bytes = tensor.numel() * tensor.element_size()
            dtype = str(tensor.dtype).removeprefix("torch.")
            entries.append(_Entry(name, dtype, tuple(tensor.shape), offset, num_bytes))
            offset += -(-num_bytes // _ALIGN) * _ALIGN
        return cls(tuple(entries), max(offset, _ALIGN))

    def table(self, extra: Mapping[str, Any]) -> bytes:
        rows = [[e.name, e.dtype, e.shape, e.offset, e.num_bytes] for e in self.entries]
        return json.dumps({"extra": dict(extra), "tensors": rows}, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Header:
    """What a valid slot says of itself."""

    step: int
    generation: int
    table_bytes: int
    payload_bytes: int
    digest: bytes


def _pack(header: Header) -> bytes:
    body = _HEADER.pack(_MAGIC, header.step, header.generation, header.table_bytes, header.payload_bytes, header.digest)
    return body + xxhash.xxh3_64_digest(body)


def _unpack(raw: bytes) -> Header | None:
    body, check = raw[: _HEADER.size], raw[_HEADER.size : _HEADER.size + 8]
    if len(check) < 8 or xxhash.xxh3_64_digest(body) != check:
        return None
    magic, step, generation, table_bytes, payload_bytes, digest = _HEADER.unpack(body)
    return Header(step, generation, table_bytes, payload_bytes, digest) if magic == _MAGIC else None


def _digest(table: bytes, payload: memoryview) -> bytes:
    hasher = xxhash.xxh3_128(table)
    hasher.update(payload)
    return hasher.digest()


def read_header(path: Path) -> Header | None:
    """The slot's header, or None when the slot is empty or half written. Does not read the payload."""
    try:
        with path.open("rb") as file:
            return _unpack(file.read(_HEADER.size + 8))
    except FileNotFoundError:
        return None


def newest_header(run_dir: Path) -> Header | None:
    """Of the newest slot, by the headers alone (what an agent reports before its workers run)."""
    headers = [read_header(path) for path in _paths(run_dir)]
    return max(filter(None, headers), key=lambda header: (header.step, header.generation), default=None)


def newest_step(run_dir: Path) -> int | None:
    header = newest_header(run_dir)
    return header.step if header else None


def _step_of(path: Path) -> tuple[int, int]:
    """(step, generation) by the header alone."""
    header = read_header(path)
    return (header.step, header.generation) if header else _VOID


def _paths(run_dir: Path) -> tuple[Path, Path]:
    return run_dir / "snapshot-0", run_dir / "snapshot-1"


@dataclass(frozen=True)
class Snapshot:
    """A complete snapshot; its slot was verified when it was found."""

    step: int
    generation: int
    path: Path
    slot: mmap.mmap

    def view(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors (CPU) by name, in the slot itself: until it is written again; and the extra values."""
        header = _unpack(self.slot[: _HEADER.size + 8])
        if header is None or (header.step, header.generation) != (self.step, self.generation):
            raise ValueError(f"{self.path} was overwritten: read a snapshot before the next one is written")
        table = json.loads(self.slot[_HEADER_BYTES : _HEADER_BYTES + header.table_bytes])
        payload = torch.frombuffer(self.slot, dtype=torch.uint8)[-header.payload_bytes :]
        state = {
            name: payload[offset : offset + num_bytes].view(getattr(torch, dtype)).reshape(shape)
            for name, dtype, shape, offset, num_bytes in table["tensors"]
        }
        return state, table["extra"]


def _verify(path: Path, slot: mmap.mmap | None = None) -> Snapshot | None:
    """What the file holds, if it is whole; `slot`: where it is mapped already."""
    header = read_header(path)
    if header is None:
        return None
    if slot is None:
        with path.open("rb") as file:
            slot = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants it writable
    if len(slot) < _HEADER_BYTES + header.table_bytes + header.payload_bytes:
        return None
    table = slot[_HEADER_BYTES : _HEADER_BYTES + header.table_bytes]
    with memoryview(slot) as view, view[len(view) - header.payload_bytes :] as payload:
        intact = _digest(table, payload) == header.digest
    return Snapshot(header.step, header.generation, path, slot) if intact else None


@dataclass
class _Slot:
    """One mapped file, kept mapped (and pinned for CUDA) while the layout stays."""

    path: Path
    layout: _Layout | None = None
    table_room: int = 0
    map: mmap.mmap | None = None
    views: list[Tensor] = field(default_factory=list)

    def invalidate(self) -> None:
        if self.path.exists():
            with self.path.open("r+b") as file:
                file.write(bytes(_HEADER.size + 8))

    def fit(self, layout: _Layout, table_bytes: int, pin: bool) -> None:
        """Map the file so that `layout` fits. Raises OutOfMemory when the memory volume is too small."""
        if self.map is not None and self.layout == layout and table_bytes <= self.table_room:
            return
        self.release()
        self.table_room = -(-2 * table_bytes // _PAGE) * _PAGE  # room for extra values that grow
        size = _HEADER_BYTES + self.table_room + layout.num_bytes
        with self.path.open("a+b") as file:
            file.truncate(size)
            try:
                os.posix_fallocate(file.fileno(), 0, size)  # a full volume is an error here, a SIGBUS later
            except OSError as error:
                raise OutOfMemory(
                    f"{self.path}: {error.strerror}: the memory volume needs {2 * size / 2**20:.0f} MiB for two"
                    " snapshots: raise resourcesPerNode.limits.memory and, where it is set, the operator's snapshotSize"
                ) from error
            self.map = mmap.mmap(file.fileno(), size)
        payload = torch.frombuffer(self.map, dtype=torch.uint8)[size - layout.num_bytes :]
        self.layout = layout
        self.views = [
            payload[e.offset : e.offset + e.num_bytes].view(getattr(torch, e.dtype)).reshape(e.shape)
            for e in layout.entries
        ]
        if pin:
            whole = torch.frombuffer(self.map, dtype=torch.uint8)
            # Pinned in place: the GPU copies straight into the slot. A refusal only makes the copy slower.
            torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), whole.numel(), 0)

    def release(self) -> None:
        if self.map is not None and torch.cuda.is_initialized():
            whole = torch.frombuffer(self.map, dtype=torch.uint8)
            torch.cuda.cudart().cudaHostUnregister(whole.data_ptr())
        self.views, self.map, self.layout = [], None, None

    def seal(self, step: int, generation: int, table: bytes) -> None:
        """Table, then header: from here on the slot counts."""
        assert self.map is not None and self.layout is not None
        self.map[_HEADER_BYTES : _HEADER_BYTES + len(table)] = table
        with memoryview(self.map) as view, view[len(view) - self.layout.num_bytes :] as payload:
            digest = _digest(table, payload)
        faults.reach("header-write", step)
        raw = _pack(Header(step, generation, len(table), self.layout.num_bytes, digest))
        self.map[: len(raw)] = raw


class SnapshotSlots:
    """Writer and reader of the two slots in `run_dir`. One thread of its own does the copying."""

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._slots = tuple(_Slot(path) for path in _paths(run_dir))
        self._steps = [_step_of(slot.path) for slot in self._slots]  # once verified: a damaged slot's is void
        self._verified = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="snapshot")
        self._done: Future[None] | None = None
        self._stream: torch.cuda.Stream | None = None

    def write(self, step: int, generation: int, state: Mapping[str, Tensor], extra: Mapping[str, Any]) -> None:
        """Start writing `state` (any device, any dtype) as of `step`; `extra` must be JSON. Errors come from wait()."""
        self.wait()
        if not self._verified:
            self.newest()
        detached = {name: tensor.detach() for name, tensor in state.items()}
        device = next((t.device for t in detached.values() if t.is_cuda), None)
        ready = None
        if device is not None:
            self._stream = self._stream or torch.cuda.Stream(device)
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(device))
        self._done = self._thread.submit(self._write, step, generation, detached, dict(extra), ready)

    def wait(self) -> None:
        """The last write counts; raises what it raised."""
        if self._done is not None:
            done, self._done = self._done, None
            done.result()

    def newest(self) -> Snapshot | None:
        """The newest complete snapshot, or None; a half-written or damaged slot is never chosen."""
        self.wait()
        self._verified = True
        for index in sorted((0, 1), key=self._steps.__getitem__, reverse=True):
            slot = self._slots[index]
            if self._steps[index] != _VOID and (snapshot := _verify(slot.path, slot.map)):
                return snapshot
            self._steps[index] = _VOID
        return None

    def _write(self, step: int, generation: int, state: dict[str, Tensor], extra: dict[str, Any], ready: Any) -> None:
        index = min((0, 1), key=self._steps.__getitem__)
        slot, layout = self._slots[index], _Layout.of(state)
        table = layout.table(extra)
        slot.invalidate()
        self._steps[index] = _VOID
        slot.fit(layout, len(table), pin=ready is not None)
        faults.reach("snapshot", step)
        self._copy(slot.views, list(state.values()), ready)
        slot.seal(step, generation, table)
        self._steps[index] = (step, generation)

    def _copy(self, views: list[Tensor], tensors: list[Tensor], ready: Any) -> None:
        if ready is None:
            for view, tensor in zip(views, tensors, strict=True):
                view.copy_(tensor)
            return
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            for view, tensor in zip(views, tensors, strict=True):
                view.copy_(tensor, non_blocking=True)
        self._stream.synchronize()
