"""Everything a worker needs before its first step: group, sources, samples, model, optimizer, stores.

Rules: what can be refused is refused before anything expensive; nothing here depends on the world size except the
sharding of the base; the order of set-up is the order of the functions.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qlora_api.layout import RunLayout
from qlora_api.memory import pick_micro_batch
from qlora_api.run import TrainConfig
from qlora_trainer import faults, preflight
from qlora_trainer.checkpoint import CheckpointWriter
from qlora_trainer.control import WorkerEnv
from qlora_trainer.data import BatchPlan, Sequences, build_sequences, hold_out
from qlora_trainer.errors import BadConfig
from qlora_trainer.loader import PackedModel, ensure_packed
from qlora_trainer.model import TrainableModel, build_model, plan_for, smallest_gpu, take_over
from qlora_trainer.optim import Optimizer
from qlora_trainer.samples import SampleSet, ensure_samples
from qlora_trainer.sharding import backend_of
from qlora_trainer.snapshot import SnapshotSlots
from qlora_trainer.sources import Source, ensure_dataset, ensure_model
from qlora_trainer.standing import Kept
from qlora_trainer.storage import ObjectStore, open_store
from qlora_trainer.tokens import load_tokenizer, pad_id

GROUP_TIMEOUT = timedelta(minutes=30)  # agents find lost peers in seconds; this is for nobody's agent


@dataclass(frozen=True)
class Data:
    """Samples with what is trained on and what is evaluated on."""

    samples: SampleSet
    sequences: Sequences
    eval_samples: SampleSet
    eval_sequences: Sequences
    plan: BatchPlan
    pad_id: int
    digests: dict[str, str]


@dataclass(frozen=True)
class Prepared:
    """What a node needs on its disk before it is let in."""

    model: Source
    packed: PackedModel
    data: Data


@dataclass
class Session:
    """A worker that is ready to restore and train."""

    config: TrainConfig
    env: WorkerEnv
    device: torch.device
    mesh: DeviceMesh | None
    data: Data
    model: TrainableModel
    optimizer: Optimizer
    store: ObjectStore
    layout: RunLayout
    model_dir: Path
    snapshots: SnapshotSlots | None  # local rank 0 only
    checkpoints: CheckpointWriter

    @property
    def is_first(self) -> bool:
        """Rank 0 writes what only one may write."""
        return self.env.rank == 0


@contextmanager
def process_group(env: WorkerEnv) -> Iterator[DeviceMesh | None]:
    """The members' group and its mesh; None for a single process."""
    if env.device_type == "cuda":
        torch.cuda.set_device(env.local_rank)
    try:
        yield _join(env) if env.world_size > 1 else None
    except Exception:
        _break_up()
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def _break_up() -> None:
    """Leave without the others: they may be gone, and threads of this process may hang in what they have in common."""
    if not dist.is_initialized():
        return
    try:
        dist.distributed_c10d._abort_process_group()
    except RuntimeError:  # a backend that can't
        dist.destroy_process_group()


def _join(env: WorkerEnv) -> DeviceMesh:
    faults.reach("rendezvous")
    dist.init_process_group(
        backend_of(env.device_type),
        init_method=env.init_method,
        rank=env.rank,
        world_size=env.world_size,
        timeout=GROUP_TIMEOUT,
    )
    preflight.check_links(env, device_of(env))
    return init_device_mesh(env.device_type, (env.world_size,))


def device_of(env: WorkerEnv) -> torch.device:
    """This worker's device."""
    return torch.device("cuda", env.local_rank) if env.device_type == "cuda" else torch.device("cpu")


def open_output(config: TrainConfig, env: WorkerEnv) -> tuple[ObjectStore, RunLayout]:
    """The store below the run's root, and its layout."""
    output = config.spec.output
    layout = RunLayout.of(output.uri, config.run)
    return open_store(layout.root, output, env.secrets_dir / "output"), layout


def make_ready(config: TrainConfig, env: WorkerEnv) -> None:
    """What an agent does while warming: the node checked, the output within reach, all that a worker needs on disk."""
    preflight.check_node(env)
    open_output(config, env)[0].list("manifest")
    prepare(config, env)


def prepare(config: TrainConfig, env: WorkerEnv) -> Prepared:
    """Model, samples and packed base on this node's disk."""
    model = ensure_model(config, env)
    data = _prepare_data(config, env, model)
    packed = ensure_packed(config, model.path, env.cache_dir, device_of(env))
    return Prepared(model, packed, data)


def _prepare_data(config: TrainConfig, env: WorkerEnv, model: Source) -> Data:
    dataset, training = config.spec.dataset, config.spec.training
    tokenizer = load_tokenizer(config, model.path)
    source = ensure_dataset(dataset.uri, config, env, "dataset")
    samples = ensure_samples(config, source, model, tokenizer, env)
    digests = {"model_digest": model.digest, "dataset_digest": source.digest}
    if dataset.eval_uri:
        eval_source = ensure_dataset(dataset.eval_uri, config, env, "eval")
        eval_samples = ensure_samples(config, eval_source, model, tokenizer, env, "evaluation set")
        digests["eval_digest"] = eval_source.digest
        chosen, held_out = np.arange(len(samples)), np.arange(len(eval_samples))
    else:
        eval_samples = samples
        chosen, held_out = hold_out(len(samples), dataset.eval_fraction, training.seed)
    sequences = build_sequences(samples, chosen, training.packing, training.max_length)
    eval_sequences = build_sequences(eval_samples, held_out, training.packing, training.max_length)
    plan = BatchPlan.of(
        len(sequences),
        training.seed,
        training.global_batch_size,
        training.micro_batch_size or 1,  # what the GPUs have memory for is known in set_up
        training.max_steps,
        training.epochs,
    )
    return Data(samples, sequences, eval_samples, eval_sequences, plan, pad_id(tokenizer), digests)


def micro_batch_size(config: TrainConfig, hf_config: Any, gpu_bytes: int) -> int:
    """Sequences of a forward pass on GPUs of at least `gpu_bytes` (0: no GPU), by the memory plan. Raises BadConfig."""
    try:
        return pick_micro_batch(config.spec, hf_config.to_dict(), gpu_bytes)
    except ValueError as error:
        raise BadConfig(str(error)) from error


def set_up(config: TrainConfig, env: WorkerEnv, mesh: DeviceMesh | None, kept: Kept) -> Session:
    """All parts, the base verified byte by byte; `kept` of an earlier generation is used and filled. Raises theirs."""
    prepared = prepare(config, env)
    device = device_of(env)
    micro_batch = micro_batch_size(config, prepared.packed.hf_config, smallest_gpu(mesh, device))
    micro_batch = broadcast(micro_batch, 0, env)  # elasticPolicy may just have changed for some of the members
    data = replace(prepared.data, plan=replace(prepared.data.plan, micro_batch_size=micro_batch))
    model = _model(config, prepared.packed, mesh, device, micro_batch, kept)
    if env.rank == 0:
        print(f"memory plan: {model.plan.summary()} {model.plan.advice()}".rstrip(), file=sys.stderr, flush=True)
    model.verify()
    optimizer = Optimizer(config, model.adapter, env.world_size)
    store, layout = open_output(config, env)
    group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT) if mesh is not None else None
    cpu_mesh = init_device_mesh("cpu", (env.world_size,)) if mesh is not None else None
    if env.local_rank == 0:
        kept.snapshots = kept.snapshots or SnapshotSlots(env.run_dir)
    checkpoints = CheckpointWriter(store, config.spec.checkpoint.keep, cpu_mesh, group)
    return Session(
        config,
        env,
        device,
        mesh,
        data,
        model,
        optimizer,
        store,
        layout,
        prepared.model.path,
        kept.snapshots,
        checkpoints,
    )


def _model(
    config: TrainConfig,
    packed: PackedModel,
    mesh: DeviceMesh | None,
    device: torch.device,
    micro_batch: int,
    kept: Kept,
) -> TrainableModel:
    """The model of the generation before, if it suits, or a new one."""
    plan = plan_for(config, packed.hf_config, mesh, device, micro_batch)
    if kept.model is None or not take_over(kept.model, config, packed, mesh, plan):
        kept.model = None
        gc.collect()  # its memory, before another one needs it
        kept.model = build_model(config, packed, mesh, device, micro_batch, plan)
    return kept.model


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
