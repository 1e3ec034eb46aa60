"""Everything a worker needs before its first step: sources, samples, model, optimizer, stores.

Rules: what can be refused is refused before anything expensive; nothing here depends on the world size except the
sharding of the base; the order of set-up is the order of the functions.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora_api.layout import RunLayout
from qlora_api.memory import pick_micro_batch
from qlora_api.memory import plan as make_plan
from qlora_api.run import TrainConfig
from qlora_trainer import preflight
from qlora_trainer.checkpoint import CheckpointWriter
from qlora_trainer.control import WorkerEnv
from qlora_trainer.data import BatchPlan, Sequences, build_sequences, hold_out
from qlora_trainer.errors import BadConfig
from qlora_trainer.group import Group, broadcast, device_of, gloo_group
from qlora_trainer.loader import PackedModel, ensure_packed
from qlora_trainer.model import TrainableModel, plan_for, smallest_gpu
from qlora_trainer.optim import Optimizer
from qlora_trainer.output import open_output
from qlora_trainer.samples import SampleSet, ensure_samples
from qlora_trainer.skeleton import read_hf_config
from qlora_trainer.snapshot import SnapshotSlots
from qlora_trainer.sources import Source, ensure_dataset, ensure_model
from qlora_trainer.standing import Kept
from qlora_trainer.storage import ObjectStore
from qlora_trainer.tokens import load_tokenizer, pad_id


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
    group: Group
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


def make_ready(config: TrainConfig, env: WorkerEnv) -> None:
    """What an agent does while warming: the node checked, the output within reach, all that a worker needs on disk."""
    preflight.check_node(env)
    open_output(config, env)[0].list("manifest")
    prepare(config, env)


def prepare(config: TrainConfig, env: WorkerEnv) -> Prepared:
    """Model, samples and packed base on this node's disk."""
    model = ensure_model(config, env)
    hf_config = read_hf_config(model.path, config.spec.model.trust_remote_code)
    require_fit(config, hf_config, smallest_gpu(None, device_of(env)))
    data = _prepare_data(config, env, model)
    packed = ensure_packed(config, model, env.cache_dir, device_of(env))
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


def require_fit(config: TrainConfig, hf_config: Any, gpu_bytes: int) -> None:
    """Raises BadConfig when even the largest allowed world has too little memory on GPUs of `gpu_bytes` (0: no GPU)."""
    nodes, each = config.spec.elastic_policy.max_nodes, config.spec.num_proc_per_node
    try:
        largest = make_plan(config.spec, hf_config.to_dict(), gpu_bytes, nodes * each)
    except ValueError:
        return  # no decoder: who reads its weights says more
    if not largest.fits:
        raise BadConfig(f"even on maxNodes ({nodes}) x numProcPerNode ({each}) GPUs {largest.advice()}")


def fits_alone(config: TrainConfig, env: WorkerEnv, hf_config: Any) -> bool:
    """Whether one device takes the whole base."""
    device = device_of(env)
    micro_batch = micro_batch_size(config, hf_config, smallest_gpu(None, device))
    plan = plan_for(config, hf_config, None, device, micro_batch)
    return plan.fits and not plan.cpu_offload


def set_up(config: TrainConfig, env: WorkerEnv, group: Group, kept: Kept, prepared: Prepared | None = None) -> Session:
    """All parts, the base verified byte by byte; what an earlier generation `kept` is used. Raises as the parts do."""
    prepared = prepared or prepare(config, env)
    device = device_of(env)
    micro_batch = micro_batch_size(config, prepared.packed.hf_config, smallest_gpu(group.mesh, device))
    micro_batch = broadcast(micro_batch, 0, env)  # elasticPolicy may just have changed for some of the members
    data = replace(prepared.data, plan=replace(prepared.data.plan, micro_batch_size=micro_batch))
    model = kept.model_for(config, prepared.packed, group.mesh, device, micro_batch)
    model.verify()
    optimizer = Optimizer(config, model.adapter, env.world_size)
    store, layout = kept.open(config, env)
    gloo, cpu_mesh = gloo_group(env)
    if env.local_rank == 0:
        kept.snapshots = kept.snapshots or SnapshotSlots(env.run_dir)
    checkpoints = CheckpointWriter(store, config.spec.checkpoint.keep, cpu_mesh, gloo)
    return Session(
        config,
        env,
        device,
        group,
        data,
        model,
        optimizer,
        store,
        layout,
        prepared.model.path,
        kept.snapshots,
        checkpoints,
    )
