"""The durable tier: the trainable state in the object store, written in slices, complete once its manifest stands.

torch.distributed.checkpoint plans and reshards; safetensors files hold the bytes and a JSON manifest with sizes and
sha256 makes them real (docs/decisions/0003-checkpoint-format.md: why not DCP's own pickled metadata). Every rank
writes and uploads its slice of each flat tensor in a thread of its own; a checkpoint can be loaded at any world size.
The key carries the generation and the manifest is written with If-None-Match: what is complete is never overwritten.
"""

import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DCP_VERSION_KEY,
    HF_DCP_VERSION,
    SAVED_OFFSETS_KEY,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from qlora_api.layout import CHECKPOINTS, MANIFEST, checkpoint_key, parse_checkpoint
from qlora_api.status import CheckpointStatus
from qlora_trainer import faults
from qlora_trainer.background import in_daemon
from qlora_trainer.errors import StorageError, TrainerError
from qlora_trainer.sources import sha256_of
from qlora_trainer.storage import ObjectStore, read_bytes
from qlora_trainer.weights import write_safetensors

FORMAT = 1
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process is what is meant
_SLICED_FROM = 4096  # elements; smaller tensors go whole into one rank's file


class FileRecord(BaseModel, frozen=True):
    """One file of a checkpoint or of an adapter."""

    name: str
    size: int
    sha256: str


class Manifest(BaseModel, frozen=True):
    """Written last: this checkpoint is complete."""

    format: int = FORMAT
    step: int
    generation: int
    time: datetime
    files: list[FileRecord]
    tensors: dict[str, tuple[str, list[int]]]  # name -> dtype, shape
    extra: dict[str, Any]


class _StoreWriter(HuggingFaceStorageWriter):
    """Writes this rank's slices to a local file, uploads it, and on the coordinator ends with the manifest."""

    def __init__(self, staging: Path, store: ObjectStore, manifest: Manifest, keep: int | None, num_ranks: int) -> None:
        super().__init__(str(staging), save_distributed=True)
        self._staging, self._store, self._manifest, self._keep, self._of = staging, store, manifest, keep, num_ranks

    def write_data(self, plan: Any, planner: Any) -> "torch.futures.Future[list[WriteResult]]":
        results = self._write_and_upload(plan.items, planner, plan.storage_data["shard_index"]) if plan.items else []
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result(results)
        return done

    def _write_and_upload(self, items: list[Any], planner: Any, shard: int) -> list[WriteResult]:
        """The same file as the base class would write, but in pieces, so that the training thread goes on."""
        tensors = {item.index.fqn: planner.resolve_data(item).detach() for item in items}
        offsets = {item.index.fqn: {SAVED_OFFSETS_KEY: item.tensor_data.chunk.offsets} for item in items}
        metadata = {CUSTOM_METADATA_KEY: json.dumps(offsets), DCP_VERSION_KEY: str(HF_DCP_VERSION), "format": "pt"}
        name = f"shard-{shard:05d}-of-{self._of:05d}.safetensors"  # flush.py's, of the same step, replaces no slice
        write_safetensors(self._staging / name, ((n, t, t.dtype) for n, t in tensors.items()), metadata)
        faults.reach("upload", self._manifest.step)
        record = self._upload(name)
        return [WriteResult(item.index, tensors[item.index.fqn].nbytes, record) for item in items]

    def _upload(self, name: str) -> FileRecord:
        path = self._staging / name
        folder = checkpoint_key(self._manifest.step, self._manifest.generation)
        with ThreadPoolExecutor(1) as beside:
            digest = beside.submit(sha256_of, path)
            self._store.put(f"{folder}/{name}", path)
        record = FileRecord(name=name, size=path.stat().st_size, sha256=digest.result())
        path.unlink()
        return record

    def finish(self, metadata: Any, results: list[list[WriteResult]]) -> None:
        records = {result.storage_data.name: result.storage_data for rank in results for result in rank}
        manifest = self._manifest.model_copy(update={"files": [records[name] for name in sorted(records)]})
        faults.reach("manifest", manifest.step)
        key = f"{checkpoint_key(manifest.step, manifest.generation)}/{MANIFEST}"
        self._store.put(key, manifest.model_dump_json().encode(), if_none_match=True)
        if self._keep is not None:
            prune(self._store, self._keep)


class CheckpointWriter:
    """Saves in the background, one checkpoint at a time. All ranks call `save` for the same steps.

    `group` is a gloo group of its own: the thread's collectives never mix with training's. None: a single process.
    """

    def __init__(self, store: ObjectStore, keep: int | None, mesh: DeviceMesh | None, group: Any = None) -> None:
        self._store, self._keep, self._mesh, self._group = store, keep, mesh, group
        self._pending: tuple[Manifest, Future[None]] | None = None
        self._pinned: dict[str, Tensor] = {}  # what comes from a GPU, kept: new memory would cost more than the copies
        self.newest: CheckpointStatus | None = None  # of this writer: all ranks know the same
        self.found: CheckpointStatus | None = None  # in the bucket at the start, where this rank looked
        self.seconds = 0.0  # from `save` to the manifest, of the newest
        self.num_failures = 0  # in a row

    @property
    def busy(self) -> bool:
        """A save is under way on this rank."""
        return self._pending is not None and not self._pending[1].done()

    def save(self, step: int, generation: int, state: Mapping[str, Tensor], extra: dict[str, Any]) -> None:
        """Start saving; waits for the save before. The tensors may change as soon as this returns."""
        self.collect(wait=True)
        tensors = {name: (str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in state.items()}
        manifest = Manifest(
            step=step, generation=generation, time=datetime.now(UTC), files=[], tensors=tensors, extra=extra
        )
        parts = {name: _part(tensor, self._mesh) for name, tensor in state.items()}
        on_gpu = next((part.device for part in parts.values() if part.is_cuda), None)
        copied = torch.cuda.current_stream(on_gpu).record_event() if on_gpu else None
        self._pending = (manifest, in_daemon(self._write, manifest, parts, on_gpu, copied, time.monotonic()))

    def _write(
        self,
        manifest: Manifest,
        parts: dict[str, Tensor],
        gpu: torch.device | None,
        copied: torch.cuda.Event | None,
        started: float,
    ) -> None:
        """In the thread: this rank's parts to the CPU, and with the other ranks' threads into the store."""
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as staging:
            with torch.cuda.stream(torch.cuda.Stream(gpu)) if gpu else nullcontext():  # training's stream stays free
                if copied is not None:
                    copied.wait()
                sliced = {name: self._on_cpu(name, part, manifest.tensors[name][1]) for name, part in parts.items()}
                if gpu:
                    torch.cuda.current_stream(gpu).synchronize()
            parts.clear()
            num_ranks = self._mesh.size() if self._mesh else 1
            writer = _StoreWriter(Path(staging), self._store, manifest, self._keep, num_ranks)
            save_state_dict(sliced, storage_writer=writer, process_group=self._group, no_dist=self._mesh is None)
        self.seconds = time.monotonic() - started

    def _on_cpu(self, name: str, part: Tensor, shape: list[int]) -> Tensor:
        local = part
        if part.is_cuda:
            if name not in self._pinned or self._pinned[name].shape != part.shape:
                self._pinned[name] = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
            local = self._pinned[name].copy_(part, non_blocking=True)
        if self._mesh is None or not _is_sliced(shape):
            return local
        return DTensor.from_local(local, self._mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=(1,))

    def collect(self, wait: bool = False) -> StorageError | None:
        """Take note of a save that has ended; the error, if it failed. With `wait` the one under way ends first."""
        if self._pending is None or not (wait or self._pending[1].done()):
            return None
        (manifest, future), self._pending = self._pending, None
        error = _storage_error(future.exception())
        if error is not None:
            self.num_failures += 1
            return error
        self.num_failures = 0
        self.newest = self.status_of(manifest)
        return None

    def status_of(self, manifest: Manifest) -> CheckpointStatus:
        """How a complete checkpoint is told."""
        uri = f"{self._store.uri}/{checkpoint_key(manifest.step, manifest.generation)}"
        return CheckpointStatus(step=manifest.step, uri=uri, time=manifest.time)

    def finish(self) -> None:
        """Wait for the save under way; raises StorageError when it failed."""
        if error := self.collect(wait=True):
            raise error


def _is_sliced(shape: list[int] | torch.Size) -> bool:
    return len(shape) == 1 and shape[0] >= _SLICED_FROM


def _part(tensor: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """A copy of this rank's part of a replicated tensor, on its device: the way to the CPU is the thread's."""
    tensor = tensor.detach()
    if mesh is None or not _is_sliced(tensor.shape):
        return tensor.clone()
    parts = tensor.chunk(mesh.size())
    return parts[mesh.get_local_rank()].clone() if mesh.get_local_rank() < len(parts) else tensor[:0].clone()


def _storage_error(error: BaseException | None) -> StorageError | None:
    """The storage failure behind a failed save; other errors are raised, in the rank's own words."""
    if error is None or isinstance(error, StorageError):
        return error
    if not isinstance(error, CheckpointException):
        raise error
    causes = [failure[0] for failure in error.failures.values()]
    for kind in (StorageError, TrainerError, Exception):
        cause = next((cause for cause in causes if isinstance(cause, kind)), None)
        if isinstance(cause, StorageError):
            return cause
        if cause is not None:
            raise cause
    raise RuntimeError("the checkpoint failed on a rank that did not say why") from error


def find_complete(store: ObjectStore) -> Iterator[Manifest]:
    """Complete checkpoints, newest first, read as it goes: a manifest is there and every file has its size."""
    entries = {entry.key: entry.size for entry in store.list(f"{CHECKPOINTS}/")}
    places = [(parse_checkpoint(key), key) for key in entries if key.endswith(f"/{MANIFEST}")]
    for place, key in sorted(((p, k) for p, k in places if p), reverse=True):
        try:
            manifest = Manifest.model_validate_json(read_bytes(store, key))
        except FileNotFoundError:
            continue  # another rank has pruned it meanwhile
        folder = checkpoint_key(*place)
        if all(entries.get(f"{folder}/{record.name}") == record.size for record in manifest.files):
            yield manifest


def find_newest(store: ObjectStore) -> Manifest | None:
    """The newest complete checkpoint."""
    return next(find_complete(store), None)


def load(store: ObjectStore, manifest: Manifest) -> dict[str, Tensor]:
    """The whole state on the CPU, every byte checked against the manifest. StorageError when one differs."""
    state = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in manifest.tensors.items()}
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as name:
        folder = Path(name)
        for record in manifest.files:
            _download(store, manifest, record, folder / record.name)
        load_state_dict(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return state


def _download(store: ObjectStore, manifest: Manifest, record: FileRecord, path: Path) -> None:
    with (
        store.get(f"{checkpoint_key(manifest.step, manifest.generation)}/{record.name}") as stream,
        path.open("wb") as out,
    ):
        shutil.copyfileobj(stream, out, 1 << 20)
    if sha256_of(path) != record.sha256:
        raise StorageError(
            f"{store.uri}: {record.name} of step {manifest.step} differs from its manifest: it is damaged"
        )


def prune(store: ObjectStore, keep: int) -> None:
    """Delete all but the `keep` newest complete checkpoints, and what incomplete ones before them left."""
    complete = [checkpoint_key(manifest.step, manifest.generation) for manifest in find_complete(store)]
    if not complete:
        return
    kept, newest = set(complete[:keep]), complete[0]
    doomed = [entry.key for entry in store.list(f"{CHECKPOINTS}/") if parse_checkpoint(entry.key)]
    doomed = [key for key in doomed if key.rsplit("/", 1)[0] not in kept and key.rsplit("/", 1)[0] < newest]
    store.delete(sorted(doomed, key=lambda key: not key.endswith(MANIFEST)))  # manifests first: never half complete
