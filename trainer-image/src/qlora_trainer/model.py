"""The model that is trained: transformers' causal LM with a packed 4-bit base and an adapter in float32.

Rules: the unquantized model never exists; how a decoder layer's packed bytes lie on the ranks is `sharding`'s matter
alone; everything random is a function of (seed, name) or (seed, step, micro batch); what a rank computes does not
depend on how many there are. The forward of a decoder layer stays transformers' own.
"""

import gc
import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from qlora_api.memory import Plan
from qlora_api.memory import plan as make_plan
from qlora_api.run import TrainConfig
from qlora_trainer.attention import NAME, pick_attention, sequence_bounds
from qlora_trainer.errors import BadConfig
from qlora_trainer.inject import measure_magnitudes, plan_groups, replace_linears
from qlora_trainer.layers import compiles, set_forward
from qlora_trainer.loader import PackedModel, corrupt, discard_damaged
from qlora_trainer.lora import Adapter, Group, LayerState
from qlora_trainer.loss import IGNORED, chunked_losses, token_losses
from qlora_trainer.quant import FP_TYPES, fingerprint
from qlora_trainer.sharding import gathered, mesh_of_one, place_base, release_base
from qlora_trainer.skeleton import CausalLM, build_skeleton, decoder_layers

_BUILT_IN = ("recomputed_layers", "host_embeddings", "cpu_offload", "micro_batch_size")  # of a plan, into a model


class TrainableModel:
    """What the training loop sees. `trainable`: PEFT's names -> float32 parameters, replicated on every rank.

    Gradients are sums over this rank's tokens divided by `num_tokens`: add them up over the ranks (`flat_grad` is all
    of them in one buffer; every `.grad` is a view of it and must stay one, though setting it to None is repaired).
    """

    def __init__(
        self,
        hf_model: CausalLM,
        packed: PackedModel,
        adapter: Adapter,
        config: TrainConfig,
        device: torch.device,
        plan: Plan,
    ) -> None:
        self.hf_model, self.packed, self.adapter, self.config, self.device = hf_model, packed, adapter, config, device
        self.plan = plan
        self.layers = decoder_layers(hf_model)[1]
        self._step_seed = 0
        self._seeds = torch.tensor([[0, number] for number in range(len(adapter.groups))], device=device)
        for group, seeds in zip(adapter.groups, self._seeds, strict=True):
            group.seeds = seeds
        self._token_losses: Callable[..., tuple[Tensor, Tensor]] = token_losses

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return self.adapter.trainable

    @property
    def frozen(self) -> dict[str, Tensor]:
        """Adapter tensors that are saved but not trained (A under freezeA), by PEFT's names."""
        return self.adapter.frozen

    @property
    def flat_grad(self) -> Tensor:
        """Every gradient, float32, 1-D, in one buffer."""
        return self.adapter.grad[self.adapter.num_a if self.adapter.freeze_a else 0 :]

    @property
    def hf_config(self) -> Any:
        return self.packed.hf_config

    def train(self) -> None:
        self.hf_model.train()

    def eval(self) -> None:
        self.hf_model.eval()

    def set_step_seed(self, seed: int, step: int, micro_index: int) -> None:
        """Fix all that is random in the next forward pass; `micro_index` counts over the global batch."""
        digest = hashlib.blake2b(f"{seed}/{step}/{micro_index}".encode(), digest_size=7).digest()
        self._step_seed = int.from_bytes(digest, "little")
        self._seeds[:, 0] = self._step_seed

    def loss(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None, num_tokens: float | Tensor
    ) -> Tensor:
        """Summed cross-entropy of this micro batch over `num_tokens`, a float32 scalar. Arguments: see `losses`."""
        return self.losses(input_ids, labels, position_ids).sum() / num_tokens

    def losses(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None) -> Tensor:
        """Cross-entropy of what follows each position, float32 (batch, length), 0 where nothing is trained.

        input_ids, labels, position_ids: (batch, length) int64; labels unshifted, -100 is ignored. Positions that
        restart at 0 mark packed samples, which neither attend to nor predict each other. Pass them from the host:
        looking for restarts on the GPU waits for it. Call `backward` before the next pass: it refreshes the copies.
        """
        packed = position_ids is not None and bool((position_ids[:, 1:] == 0).any())
        shifted = torch.full_like(labels, IGNORED)
        shifted[:, :-1] = labels[:, 1:]
        if packed and position_ids is not None:
            shifted[:, :-1][position_ids[:, 1:] == 0] = IGNORED
        self.adapter.refresh()
        hidden = self.hidden_states(input_ids, position_ids if packed else None)
        return self._head_losses(hidden, shifted.to(self.device, non_blocking=True)).view(labels.shape)

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        """The decoder's last hidden states, (batch, length, d)."""
        table = self.hf_model.get_input_embeddings()
        place = table.weight.device  # the host, where the plan says so
        embeddings = table(input_ids.to(place, non_blocking=True)).to(self.device, non_blocking=True)
        if self.hf_model.training:
            embeddings = self._noised(embeddings)
            embeddings.requires_grad_()  # every layer computes the same graph, the first included
        decoder = self.hf_model.base_model
        bounds = {}
        if position_ids is not None and self.hf_model.config._attn_implementation == NAME:
            bounds["cu_seq_lens_q"] = sequence_bounds(position_ids.cpu()).to(self.device, non_blocking=True)
        if position_ids is not None:
            position_ids = position_ids.to(self.device, non_blocking=True)
        output = decoder(inputs_embeds=embeddings, position_ids=position_ids, use_cache=False, **bounds)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def compile_loss(self) -> None:
        """Fuse the elementwise part of the cross-entropy."""
        self._token_losses = torch.compile(token_losses, dynamic=False)

    def verify(self) -> None:
        """Compare every layer's bytes, as the ranks gather them, with the index. Raises CorruptBase."""
        for index, (layer, packed) in enumerate(zip(self.layers, self.packed.layers, strict=True)):
            with gathered(layer) as blob:
                found = fingerprint(blob[: packed.size])
            if found == packed.fingerprint:
                continue
            on_disk = discard_damaged(self.packed, index)
            raise corrupt(f"decoder layer {index}: checksum {found} of the gathered bytes", packed.fingerprint, on_disk)

    def _noised(self, embeddings: Tensor) -> Tensor:
        """NEFTune (arXiv:2310.05914): uniform noise of alpha / sqrt(length * d) on the embeddings."""
        alpha = self.config.spec.training.neftune_noise_alpha
        if alpha is None:
            return embeddings.detach()
        generator = torch.Generator(self.device).manual_seed(self._step_seed)
        bound = alpha / math.sqrt(embeddings.shape[1] * embeddings.shape[2])
        noise = torch.rand(embeddings.shape, generator=generator, device=self.device) * (2 * bound) - bound
        return embeddings.detach() + noise.to(embeddings.dtype)

    def _head_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        head = self.hf_model.get_output_embeddings()
        assert head is not None, "a causal LM has a head"
        config = self.hf_config
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        cap = getattr(config, "final_logit_softcapping", None) or 0.0
        flat = hidden.reshape(-1, hidden.shape[-1])
        return chunked_losses(flat, head.weight, head.bias, labels.view(-1), cap, scale, self._token_losses)


def build_model(
    config: TrainConfig,
    packed: PackedModel,
    mesh: DeviceMesh | None,
    device: torch.device,
    micro_batch: int,
    plan: Plan | None = None,
) -> TrainableModel:
    """The model of `config` on `device`, its base sharded over `mesh` (None: one rank) by `plan` (None: made here).

    Raises BadConfig, BadModel.
    """
    spec = config.spec
    dtype = FP_TYPES[spec.quantization.compute_dtype]
    attention = pick_attention(packed.hf_config, spec.training.max_length, device, dtype)
    hf_model = build_skeleton(packed.hf_config, dtype, packed.trust_remote_code, attention)
    plan = plan or plan_for(config, packed.hf_config, mesh, device, micro_batch)
    if plan.cpu_offload and mesh is None:
        mesh = mesh_of_one(device)
    sharded = mesh is not None and plan.sharding != "NO_SHARD"
    _fill_rest(hf_model, packed.read_rest(device, _host_table(hf_model) if plan.host_embeddings else ""), device)
    tables = packed.read_tables(device)
    layers = decoder_layers(hf_model)[1]
    states = [LayerState() for _ in layers]
    dora = spec.lora.use_dora
    groups = [Group(own, tables, dtype, states[own.layer], dora) for own in plan_groups(spec.lora, packed)]
    replace_linears(layers, groups, dora)
    adapter = Adapter(groups, device, dtype, spec.training.seed, spec.lora.freeze_a, dora)
    place_base(hf_model, layers, packed, mesh if sharded else None, plan, device)
    compiled = compiles(device)
    for index, (layer, state) in enumerate(zip(layers, states, strict=True)):
        set_forward(layer, state, index < plan.recomputed_layers, compiled)
    model = TrainableModel(hf_model, packed, adapter, config, device, plan)
    if compiled:
        model.compile_loss()
    if dora:
        measure_magnitudes(layers, groups)
    model.train()
    return model


def _host_table(hf_model: CausalLM) -> str:
    """Name of the embedding table, if it is a plain one."""
    table = hf_model.get_input_embeddings()
    return next(
        (f"{name}.weight" for name, m in hf_model.named_modules() if m is table and type(m) is nn.Embedding), ""
    )


def _fill_rest(hf_model: CausalLM, rest: dict[str, Tensor], device: torch.device) -> None:
    """Put the unquantized tensors and the buffers in place; linears' weights stay on the meta device."""
    for name, tensor in rest.items():
        parent, _, leaf = name.rpartition(".")
        module = hf_model.get_submodule(parent)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
        else:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    hf_model.tie_weights()
    for module in hf_model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[leaf] = buffer.to(device)


def obstacles(model: TrainableModel, config: TrainConfig, packed: PackedModel, plan: Plan) -> list[str]:
    """Why a model of an earlier generation can't serve this one; none: `move` it."""
    found = {
        "another base": packed.digest != model.packed.digest,
        "another spec": _of_model(config) != _of_model(model.config),
        "another memory plan": any(getattr(plan, name) != getattr(model.plan, name) for name in _BUILT_IN),
        "FSDP2 holds it": any(isinstance(layer, FSDPModule) for layer in model.layers),
        "its magnitudes are measured at the start": config.spec.lora.use_dora,
    }
    return [reason for reason, holds in found.items() if holds]


def move(
    model: TrainableModel, config: TrainConfig, packed: PackedModel, mesh: DeviceMesh | None, plan: Plan
) -> TrainableModel:
    """A model without `obstacles` in this generation's world, trained in nothing. Raises as build_model.

    Compiled code stays; so does a base that is whole before and after, any other is read from the node's disk.
    """
    if {model.plan.sharding, plan.sharding} != {"NO_SHARD"}:
        release_base(model.layers)
        for group in model.adapter.groups:
            group.state.blob = None
        free_memory()
        sharded = plan.sharding != "NO_SHARD"
        place_base(model.hf_model, model.layers, packed, mesh if sharded else None, plan, model.device)
    model.plan, model.config, model.packed = plan, config, packed
    model.adapter.reset(config.spec.training.seed)
    model.train()
    return model


def free_memory() -> None:
    """Give back what nothing refers to: symmetric memory takes no part in the allocator's cache."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _of_model(config: TrainConfig) -> dict[str, Any]:
    """What of a spec a model is built from."""
    return config.spec.model_dump(include={"model", "quantization", "lora", "training"})


def plan_for(
    config: TrainConfig, hf_config: Any, mesh: DeviceMesh | None, device: torch.device, micro_batch: int | None = None
) -> Plan:
    """The memory plan on this device. Raises BadConfig when config.json cannot be planned for."""
    world_size = 1 if mesh is None else mesh.size()
    try:
        return make_plan(config.spec, hf_config.to_dict(), smallest_gpu(mesh, device), world_size, micro_batch)
    except ValueError as error:
        raise BadConfig(str(error)) from error


def smallest_gpu(mesh: DeviceMesh | None, device: torch.device) -> int:
    """Bytes of the smallest GPU among the ranks, which must all plan alike; 0 on CPUs."""
    if device.type != "cuda":
        return 0
    own = torch.tensor([torch.cuda.get_device_properties(device).total_memory], device=device)
    if mesh is not None:
        dist.all_reduce(own, dist.ReduceOp.MIN, mesh.get_group())
    return int(own.item())
