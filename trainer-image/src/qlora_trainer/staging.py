"""Bytes between files and a device in pieces: several threads, each with two pinned buffers and a stream of its own.

A plain copy from a mapped file to a GPU takes one thread through page faults and the driver's own staging; a few
threads that read into pinned memory reach what the page cache gives.

Rules: a destination's memory may still be in use on the caller's stream, so copies wait for that stream; when `read`
returns or raises, no thread and no copy touches a destination any more. Nothing here depends on a GPU but the pinning
and the streams: on a CPU the same threads copy the same pieces.
"""

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from io import FileIO
from itertools import cycle
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qlora_trainer.errors import BadModel

CHUNK_BYTES = 4 << 20  # a piece: 0.1 ms over PCIe, and pinning the buffers stays cheap
NUM_LANES = 8  # threads: 64 MiB of pinned memory in all


@dataclass(frozen=True)
class ReadJob:
    """Bytes [offset, offset + length) of a file into a contiguous 1-D uint8 tensor of `length` bytes."""

    path: Path
    offset: int
    length: int
    destination: Tensor

    def split(self, size: int) -> Iterator["ReadJob"]:
        """The job in pieces of at most `size` bytes."""
        assert self.destination.numel() == self.length, f"{self.path}: {self.length} bytes do not fit the destination"
        for start in range(0, self.length, size):
            part = self.destination[start : start + size]
            yield ReadJob(self.path, self.offset + start, part.numel(), part)


Pieces = deque[tuple[FileIO, ReadJob]]


class Stager:
    """Threads and buffers that fill tensors on `device` from files; close it (`with`) to give them back."""

    def __init__(self, device: torch.device, num_lanes: int = 0, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.device = torch.empty(0, device=device).device  # with its number: each thread has a current device
        self._chunk_bytes = chunk_bytes
        self._num_lanes = num_lanes or min(NUM_LANES, len(os.sched_getaffinity(0)))
        self._own = threading.local()
        self._pool = ThreadPoolExecutor(self._num_lanes, "staging")

    def __enter__(self) -> "Stager":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def read(self, jobs: Iterable[ReadJob]) -> None:
        """Fill every destination; several threads may call this at once.

        Raises the first error: BadModel for a file that is too short, OSError for one that cannot be read.
        """
        jobs = list(jobs)
        ready = self._mark()
        with ExitStack() as stack:
            files = {path: stack.enter_context(open(path, "rb", buffering=0)) for path in {job.path for job in jobs}}
            pieces = deque((files[job.path], piece) for job in jobs for piece in job.split(self._chunk_bytes))
            num_lanes = min(self._num_lanes, len(pieces))
            finish([self._pool.submit(self._drain, pieces, ready) for _ in range(num_lanes)])

    def _mark(self) -> torch.cuda.Event | None:
        """What the caller's stream has been told to do so far."""
        if self.device.type != "cuda":
            return None
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self.device))
        return ready

    def _drain(self, pieces: Pieces, ready: torch.cuda.Event | None) -> None:
        try:
            if not hasattr(self._own, "lane"):  # not the pool's initializer: it would hide why a lane cannot be had
                self._own.lane = _Lane(self.device, self._chunk_bytes)
            self._own.lane.drain(pieces, ready)
        except BaseException:
            pieces.clear()  # the other lanes need not go on
            raise


class _Lane:
    """One thread's two buffers, which take turns: one is filled while the other is copied."""

    def __init__(self, device: torch.device, chunk_bytes: int) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # this thread's, for pinning and streams
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._slots = cycle([_Slot(chunk_bytes, device.type == "cuda") for _ in range(2)])

    def drain(self, pieces: Pieces, ready: torch.cuda.Event | None) -> None:
        """Copy pieces until none is left; those that this lane took are in place when this returns or raises."""
        if self._stream is None:
            for file, piece in _taken(pieces):
                self._fill(file, piece)
            return
        assert ready is not None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            try:
                for file, piece in _taken(pieces):
                    self._fill(file, piece)
            finally:
                self._stream.synchronize()

    def _fill(self, file: FileIO, piece: ReadJob) -> None:
        slot = next(self._slots)
        slot.wait()
        staged = slot.buffer[: piece.length]
        _read(staged, file, piece)
        piece.destination.copy_(staged, non_blocking=True)
        slot.mark()


class _Slot:
    """A buffer and when its last copy is over."""

    def __init__(self, chunk_bytes: int, pinned: bool) -> None:
        self.buffer = torch.empty(chunk_bytes, dtype=torch.uint8, pin_memory=pinned)
        self._copied = torch.cuda.Event() if pinned else None

    def wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()

    def mark(self) -> None:
        if self._copied is not None:
            self._copied.record()


def _taken(pieces: Pieces) -> Iterator[tuple[FileIO, ReadJob]]:
    """Pieces that nobody else has taken, until there are none."""
    with suppress(IndexError):
        while True:
            yield pieces.popleft()


def _read(staged: Tensor, file: FileIO, piece: ReadJob) -> None:
    view, done = staged.numpy().data, 0
    while done < piece.length:
        count = os.preadv(file.fileno(), [view[done:]], piece.offset + done)
        if count == 0:
            raise BadModel(
                f"{piece.path} is torn: it ends at byte {piece.offset + done}, its index names"
                f" {piece.offset + piece.length}. Delete it from the node's cache (the next start makes it anew),"
                " or copy the model again"
            )
        done += count


def read_into(jobs: Iterable[ReadJob], device: torch.device) -> None:
    """Fill every job's destination on `device`. Raises BadModel, OSError."""
    with Stager(device) as stager:
        stager.read(jobs)


def write_tensor(file: BinaryIO, source: Tensor, dtype: torch.dtype, chunk_bytes: int = CHUNK_BYTES) -> None:
    """Append a contiguous tensor to a file as `dtype`; what must be copied first goes through one (pinned) buffer."""
    flat = source.view(-1)
    if flat.dtype == dtype and flat.device.type == "cpu":  # a mapped tensor goes from page cache to page cache
        file.write(flat.view(torch.uint8).numpy().data)
        return
    staged = torch.empty(chunk_bytes // dtype.itemsize, dtype=dtype, pin_memory=flat.is_cuda)
    for part in flat.split(staged.numel()):
        staged[: part.numel()].copy_(part)
        file.write(staged[: part.numel()].view(torch.uint8).numpy().data)


def finish(futures: Sequence[Future[Any]]) -> None:
    """Wait for all; when one fails, those that have not begun are dropped. Raises the first one's error."""
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
    for future in futures:
        if not future.cancelled():
            future.result()
