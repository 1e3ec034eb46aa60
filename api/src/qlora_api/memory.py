"""The memory plan: how a run's base is placed on the GPUs at hand, its micro batch, and what is recomputed.

Pure: a function of the spec, the model's config.json and the size of a GPU; the trainer follows it. The bytes are
counted in footprint.py. Order of preference: docs/decisions/0006-order-of-the-memory-plan.md.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from qlora_api.base import ApiModel
from qlora_api.footprint import Placement, Shapes, Sharding, gpu_items, host_items, host_table_bytes, shapes_of
from qlora_api.types import QLoRAFinetuneSpec

USABLE = 0.92  # share of a GPU that a plan may fill: context, NCCL and fragmentation take the rest
TARGET_TOKENS = 8192  # a micro batch of so many tokens fills the chip: more gains under 2 %


class Plan(ApiModel):
    """What one rank needs, in bytes by item, and what follows from it."""

    sharding: Sharding
    micro_batch_size: int = Field(ge=1)
    num_layers: int
    recomputed_layers: int = Field(description="Decoder layers whose activations are recomputed, the first ones.")
    cpu_offload: bool = Field(description="The shards stay in host memory.")
    host_embeddings: bool = Field(description="The embedding table stays in host memory, mapped from the cache.")
    gpu: dict[str, int] = Field(description="Bytes on the GPU at the peak of a step.")
    host: dict[str, int] = Field(description="Bytes of host memory a rank.")
    gpu_limit: int = Field(description="Bytes of the GPU that the plan may use; 0: no GPU.")

    @property
    def gpu_bytes(self) -> int:
        return sum(self.gpu.values())

    @property
    def fits(self) -> bool:
        return not self.gpu_limit or self.gpu_bytes <= self.gpu_limit

    def advice(self) -> str:
        """What to change when the plan does not fit; empty when it does."""
        if self.fits:
            return ""
        need, have = self.gpu_bytes / 2**30, self.gpu_limit / 2**30
        largest = max(self.gpu, key=lambda item: self.gpu[item])
        offload = "" if self.cpu_offload else " set training.cpuOffload: true,"
        return (
            f"the run needs {need:.1f} GiB a GPU and {have:.1f} GiB are usable (most for {largest}): lower"
            f" training.maxLength or microBatchSize,{offload} or add nodes"
        )

    def summary(self) -> str:
        """One line for the log."""
        offloaded = f", base in host memory ({self.host['base'] / 2**30:.1f} GiB)" if self.cpu_offload else ""
        memory = f", {self.gpu_bytes / 2**30:.1f} of {self.gpu_limit / 2**30:.1f} usable GiB" if self.gpu_limit else ""
        return (
            f"{self.sharding}{offloaded}, micro batch {self.micro_batch_size},"
            f" {self.recomputed_layers} of {self.num_layers} layers recomputed{memory}"
        )


def plan(
    spec: QLoRAFinetuneSpec,
    model_config: Mapping[str, Any],
    gpu_bytes: int,
    world_size: int,
    micro_batch_size: int | None = None,
) -> Plan:
    """The plan for `world_size` ranks with GPUs of `gpu_bytes` (0: no GPU). It may not fit: see Plan.fits.

    Raises ValueError when config.json is not a decoder-only transformer's.
    """
    micro_batch = micro_batch_size or pick_micro_batch(spec, model_config, gpu_bytes)
    return _first_that_fits(spec, shapes_of(model_config), int(gpu_bytes * USABLE), world_size, micro_batch)


def pick_micro_batch(spec: QLoRAFinetuneSpec, model_config: Mapping[str, Any], gpu_bytes: int) -> int:
    """Sequences of a forward pass: the spec's, else the largest useful number that the smallest world has memory for.

    Useful: up to TARGET_TOKENS, a divisor of the global batch that leaves no GPU of the largest world without work.
    The present world does not matter: other micro batches would have other dropout masks, so a run would depend on who
    was there. Offloading comes after smaller micro batches.
    """
    if spec.training.micro_batch_size:
        return spec.training.micro_batch_size
    shapes, limit = shapes_of(model_config), int(gpu_bytes * USABLE)
    smallest, largest = (
        n * spec.num_proc_per_node for n in (spec.elastic_policy.min_nodes, spec.elastic_policy.max_nodes)
    )
    plans = [_first_that_fits(spec, shapes, limit, smallest, n) for n in _micro_batches(spec, largest)]
    fitting = [made for made in plans if made.fits]
    on_gpu = [made for made in fitting if not made.cpu_offload]
    return (on_gpu or fitting or plans[-1:])[0].micro_batch_size


def _micro_batches(spec: QLoRAFinetuneSpec, world_size: int) -> list[int]:
    """Micro batches to try, largest first: divisors of the global batch that keep every rank busy."""
    training = spec.training
    most = max(1, min(TARGET_TOKENS // training.max_length, training.global_batch_size // world_size))
    return [n for n in range(most, 0, -1) if training.global_batch_size % n == 0]


def _first_that_fits(spec: QLoRAFinetuneSpec, shapes: Shapes, limit: int, world_size: int, micro_batch: int) -> Plan:
    """By the order of `_placements`; the last one when none fits."""
    for base in _placements(spec, world_size):
        made = _with_fewest_recomputed(spec, shapes, limit, base, micro_batch)
        if made.fits:
            break
    return made


def _placements(spec: QLoRAFinetuneSpec, world_size: int) -> list[Placement]:
    """Placements of the base to try, fastest first.

    `auto` never takes SHARD_GRAD_OP: the base is frozen, so gathered for the backward pass it is as large as a whole
    one, plus the shard. Where that fits, NO_SHARD does, and is faster.
    """
    wanted, offload = spec.training.sharding_strategy, spec.training.cpu_offload
    whole = Placement(world_size, "NO_SHARD")
    offloaded = Placement(world_size, "FULL_SHARD", offload=True, host_table=True)
    if wanted != "auto":
        shards = wanted != "NO_SHARD" and (world_size > 1 or offload)  # one rank shards only to offload
        return [Placement(world_size, wanted, offload, host_table=True) if shards else whole]
    if offload:
        return [offloaded]
    sharded = [Placement(world_size, "FULL_SHARD", host_table=True)] if world_size > 1 else []
    return [whole, whole._replace(host_table=True), *sharded, offloaded]


def _with_fewest_recomputed(
    spec: QLoRAFinetuneSpec, shapes: Shapes, limit: int, base: Placement, micro_batch: int
) -> Plan:
    tokens = micro_batch * spec.training.max_length

    def build(recomputed: int) -> Plan:
        return Plan(
            sharding=base.sharding,
            micro_batch_size=micro_batch,
            num_layers=shapes.num_layers,
            recomputed_layers=recomputed,
            cpu_offload=base.offload,
            host_embeddings=limit > 0 and host_table_bytes(spec, shapes, base, tokens) > 0,
            gpu=gpu_items(spec, shapes, base, micro_batch, recomputed) if limit else {},
            host=host_items(spec, shapes, base),
            gpu_limit=limit,
        )

    policy = spec.training.gradient_checkpointing
    if policy == "full" or (policy == "none" or not limit):
        return build(shapes.num_layers if policy == "full" else 0)
    low, high = 0, shapes.num_layers  # fewest that fit: the need falls with every recomputed layer
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if build(middle).fits else (middle + 1, high)
    return build(low)
