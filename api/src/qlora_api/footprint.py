"""What a run keeps on a GPU and on a host, in bytes, item by item: counted from shapes.

Rules: pure arithmetic over the spec and the model's config.json; the few measured constants stand at the top with the
measurement that they come from.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from qlora_api.base import ApiModel
from qlora_api.types import QLoRAFinetuneSpec

Sharding = Literal["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"]

BLOCK, BLOCK2, ALIGNMENT = 64, 256, 256  # of the packed format (qlora_trainer.quant)
LOSS_CHUNK = 2048  # tokens whose logits exist at a time (qlora_trainer.loss)
GPU_FIXED = 128 << 20  # workspaces of cuBLAS and cuDNN and small tensors; fitted to the runs of benchmarks/results.md
HOST_FIXED = int(1.6 * 2**30)  # anonymous memory of a worker: interpreter, torch, compiled code
ACTIVATIONS_MEASURED = 1.01  # measured over counted: statistics of norms and attention, alignment
HOST_LOOKUP = 32 << 20  # bytes of embeddings a micro batch that may come from host memory: a few ms a step
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class Placement(NamedTuple):
    """Where the frozen base lies."""

    world_size: int
    sharding: Sharding
    offload: bool = False  # the shards in host memory
    host_table: bool = False  # the embedding table in host memory, where a lookup is small


class Shapes(ApiModel):
    """A decoder-only model's sizes; `linears` are (rows, columns, reads the same input as the one before)."""

    num_layers: int
    hidden: int
    feed_forward: int
    query: int
    key_value: int
    vocabulary: int
    tied: bool
    gated: bool

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of a layer's linears by their usual names."""
        d, ff = self.hidden, self.feed_forward
        attention = {"q_proj": (self.query, d), "k_proj": (self.key_value, d), "v_proj": (self.key_value, d)}
        mlp = {"gate_proj": (ff, d), "up_proj": (ff, d)} if self.gated else {"up_proj": (ff, d)}
        return {**attention, "o_proj": (d, self.query), **mlp, "down_proj": (d, ff)}


NOT_GATED = frozenset({"phi", "gpt_neox", "gpt2", "opt", "bloom", "falcon", "starcoder2", "gpt_bigcode"})


def shapes_of(model_config: Mapping[str, Any]) -> Shapes:
    """Sizes from a config.json. ValueError when it is not a decoder-only transformer's."""
    config = model_config.get("text_config") or model_config
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head = config.get("head_dim") or hidden // heads
        return Shapes(
            num_layers=config["num_hidden_layers"],
            hidden=hidden,
            feed_forward=config.get("intermediate_size") or 4 * hidden,
            query=heads * head,
            key_value=(config.get("num_key_value_heads") or heads) * head,
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            gated=config.get("model_type") not in NOT_GATED,
        )
    except KeyError as error:
        raise ValueError(f"config.json lacks {error}: the memory plan knows decoder-only transformers") from error


def gpu_items(
    spec: QLoRAFinetuneSpec, shapes: Shapes, base: Placement, micro_batch: int, recomputed: int
) -> dict[str, int]:
    """Bytes on one GPU at the peak of a step, by item."""
    tokens = micro_batch * spec.training.max_length
    item = ITEM_BYTES[spec.quantization.compute_dtype]
    kept = shapes.num_layers - recomputed
    activation = activation_bytes(spec, shapes, tokens)
    boundary = tokens * shapes.hidden * item
    return {
        "base": _base_bytes(spec, shapes, base),
        "embeddings": rest_bytes(spec, shapes) - host_table_bytes(spec, shapes, base, tokens),
        "adapter": adapter_numel(spec, shapes) * _bytes_per_trainable(spec),
        "activations": kept * activation + recomputed * boundary,
        "workspace": GPU_FIXED
        + max(_loss_bytes(shapes, tokens, item), _backward_bytes(spec, shapes, tokens, recomputed)),
    }


def layer_bytes(spec: QLoRAFinetuneSpec, shapes: Shapes) -> int:
    """Packed bytes of one decoder layer, as qlora_trainer.quant lays them out."""
    end = 0
    for rows, columns in shapes.linears.values():
        for size in _range_sizes(spec, rows * columns):
            end = _align(end) + size
    return _align(end)


def _range_sizes(spec: QLoRAFinetuneSpec, numel: int) -> list[int]:
    if spec.quantization.type == "none":
        return [numel * ITEM_BYTES[spec.quantization.storage_dtype]]
    blocks = -(-numel // BLOCK)
    codes = (numel + 1) // 2
    return [codes, blocks, 4 * -(-blocks // BLOCK2), 4] if spec.quantization.double_quant else [codes, 4 * blocks]


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _base_bytes(spec: QLoRAFinetuneSpec, shapes: Shapes, base: Placement) -> int:
    layer = layer_bytes(spec, shapes)
    if base.sharding == "NO_SHARD":
        return shapes.num_layers * layer
    shard = -(-layer // base.world_size)
    shards = shard if base.offload else shapes.num_layers * shard  # offloaded: the one on its way
    whole = shapes.num_layers if base.sharding == "SHARD_GRAD_OP" else 2  # the layer in use and the next one
    return shards + whole * layer


def rest_bytes(spec: QLoRAFinetuneSpec, shapes: Shapes) -> int:
    """Embeddings, head and norms: replicated, in the storage type."""
    matrices = 1 if shapes.tied else 2
    numel = matrices * shapes.vocabulary * shapes.hidden + (2 * shapes.num_layers + 1) * shapes.hidden
    return numel * ITEM_BYTES[spec.quantization.storage_dtype]


def host_table_bytes(spec: QLoRAFinetuneSpec, shapes: Shapes, base: Placement, tokens: int) -> int:
    """Bytes of the embedding table that need no GPU: it is no head, and a lookup is small or memory all that counts."""
    item = ITEM_BYTES[spec.quantization.storage_dtype]
    small = tokens * shapes.hidden * item <= HOST_LOOKUP or base.offload
    return shapes.vocabulary * shapes.hidden * item if base.host_table and small and not shapes.tied else 0


def adapter_numel(spec: QLoRAFinetuneSpec, shapes: Shapes) -> int:
    """Elements of A, B and DoRA's magnitudes."""
    total = 0
    for name, (rows, columns) in shapes.linears.items():
        if _is_target(name, spec.lora.target_modules):
            total += spec.lora.r * (rows + columns) + (rows if spec.lora.use_dora else 0)
    return shapes.num_layers * total


def _is_target(name: str, targets: list[str]) -> bool:
    return targets == ["all-linear"] or any(target.rpartition(".")[2] == name for target in targets)


def _bytes_per_trainable(spec: QLoRAFinetuneSpec) -> int:
    """Master, gradient, working copy, two moments; under early stopping the best evaluation's master."""
    work = 0 if spec.quantization.compute_dtype == "float32" else 2
    return 4 + 4 + _best_bytes(spec) + work + (8 if spec.training.optimizer == "adamw" else 2)


def _best_bytes(spec: QLoRAFinetuneSpec) -> int:
    return 4 if spec.training.early_stopping_patience else 0


def activation_bytes(spec: QLoRAFinetuneSpec, shapes: Shapes, tokens: int) -> int:
    """What a decoder layer keeps for its backward pass: inputs of its linears, norms and attention."""
    d, ff = shapes.hidden, shapes.feed_forward
    gates = 3 if shapes.gated else 2
    item = ITEM_BYTES[spec.quantization.compute_dtype]
    wide = 5 * d + 2 * shapes.query + 2 * shapes.key_value + gates * ff
    low_rank = spec.lora.r * sum(_is_target(name, spec.lora.target_modules) for name in shapes.linears)
    return int(ACTIVATIONS_MEASURED * tokens * ((wide + low_rank) * item + 4 * shapes.query // 128))


def _loss_bytes(shapes: Shapes, tokens: int, item: int) -> int:
    """Logits of a chunk, their gradient, and the hidden states' gradient."""
    chunk = min(tokens, LOSS_CHUNK)
    return 2 * chunk * shapes.vocabulary * item + 4 * tokens * shapes.hidden * item


def _backward_bytes(spec: QLoRAFinetuneSpec, shapes: Shapes, tokens: int, recomputed: int) -> int:
    """Beside what is kept: a recomputed layer's activations, gradients in flight, one dequantized weight.

    Partial sums of an adapter's gradients (a share of 4 r / 512, or 4 r / 256 above r = 16, of dy's numbers) are freed
    before the weight and its product come.
    """
    item = ITEM_BYTES[spec.quantization.compute_dtype]
    gates = 2 if shapes.gated else 1
    weight = shapes.feed_forward * shapes.hidden * item
    if recomputed:  # its own activations are freed as fast as gradients of their size appear
        return activation_bytes(spec, shapes, tokens) + weight + 2 * tokens * shapes.hidden * item
    partial = tokens * shapes.feed_forward * spec.lora.r * 4 // (512 if spec.lora.r <= 16 else 256)
    later = max(weight + tokens * shapes.hidden * item, partial if spec.lora.r <= 32 else 0)
    return later + tokens * (gates * shapes.feed_forward + shapes.hidden) * item


def host_items(spec: QLoRAFinetuneSpec, shapes: Shapes, base: Placement) -> dict[str, int]:
    """Bytes of host memory a rank: the worker, two snapshot slots of the trainable state, an offloaded base."""
    state = adapter_numel(spec, shapes) * (_best_bytes(spec) + (12 if spec.training.optimizer == "adamw" else 6))
    layer = layer_bytes(spec, shapes)
    offloaded = shapes.num_layers * -(-layer // base.world_size) if base.offload else 0
    return {"worker": HOST_FIXED, "snapshots": 2 * state, "base": offloaded, "loading": layer}
