"""A decoder layer's packed bytes, whole or in shards: where they are and how a layer gets them while it runs.

On one host the ranks read each other's shards (peers.py); else FSDP2 shards them, a layer's bytes being one parameter.
Rules for that: the bytes travel as integers through FSDP2's tensor-subclass hooks. Viewed as bfloat16 they come back
damaged on CUDA (NaN patterns are canonicalized on the way in: bitsandbytes#1945, pytorch#159333), and a plain uint8
parameter is refused; so `PackedBytes` wears a floating type outside and hands over its bytes.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from qlora_api.footprint import Sharding
from qlora_api.memory import Plan
from qlora_trainer.loader import PackedModel
from qlora_trainer.peers import PeerLayer, open_peers, part_size
from qlora_trainer.workclock import GATHERS

_KEEPS_BYTES = ("_to_copy", "new_zeros", "new_empty", "empty_like", "zeros_like")


class PackedBytes(torch.Tensor):
    """uint8 bytes that call themselves bfloat16 of the same shape; `data_bytes` are the bytes."""

    data_bytes: Tensor

    @staticmethod
    def __new__(cls, data_bytes: Tensor) -> "PackedBytes":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            data_bytes.shape,
            dtype=torch.bfloat16,
            device=data_bytes.device,
            strides=data_bytes.stride(),
            storage_offset=data_bytes.storage_offset(),
        )

    def __init__(self, data_bytes: Tensor) -> None:
        assert data_bytes.dtype == torch.uint8
        self.data_bytes = data_bytes

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data_bytes"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: None, size: Any, stride: Any) -> "PackedBytes":
        return PackedBytes(inner["data_bytes"])

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PackedBytes({tuple(self.shape)}, {self.device})"

    @classmethod  # torch declares its default as a plain function
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any, kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func.__name__
        if name.startswith("copy_"):
            args[0].data_bytes.copy_(_bytes(args[1]))
            return args[0]
        if name.startswith(_KEEPS_BYTES):  # the outer type never reaches the bytes
            kwargs.pop("dtype", None)
            kwargs.pop("layout", None)
        result = func(*pytree.tree_map(_bytes, args), **pytree.tree_map(_bytes, kwargs))
        return pytree.tree_map_only(torch.Tensor, _wrap, result)

    def fsdp_pre_all_gather(
        self,
        mesh: DeviceMesh,
        outer_size: Any = None,
        outer_stride: Any = None,
        module: Any = None,
        mp_policy: Any = None,
    ) -> tuple[tuple[Tensor, ...], None]:
        """What FSDP2 gathers: the bytes, eight in a word (they copy four times faster than one by one)."""
        return (self.data_bytes.view(torch.int64),), None

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: None, param_dtype: torch.dtype, *, out: Any = None
    ) -> tuple["PackedBytes", tuple[Tensor, ...]] | None:
        """The gathered bytes, in place of the parameter; written into the same storage from the second time on."""
        if out is not None:
            return None
        (words,) = outputs
        return PackedBytes(words.view(torch.uint8)), (words,)


def _bytes(value: Any) -> Any:
    return value.data_bytes if isinstance(value, PackedBytes) else value


def _wrap(value: Tensor) -> Any:
    return PackedBytes(value) if value.dtype == torch.uint8 else value


def packed_parameter(data_bytes: Tensor) -> nn.Parameter:
    """A frozen parameter of a layer's bytes."""
    return nn.Parameter(PackedBytes(data_bytes), requires_grad=False)


def peers_of(layer: nn.Module) -> PeerLayer | None:
    """How the layer's bytes are read from peers; None: they are a parameter of its own."""
    return getattr(layer, "peers", None)


def open_layer(layer: nn.Module) -> Tensor:
    """The whole layer's bytes (uint8, 1-D): gathered by FSDP2, or read from the peers for use until `close_layer`."""
    if (peers := peers_of(layer)) is not None:
        return peers.open()
    packed = layer.packed
    assert isinstance(packed, PackedBytes), "the layer is not gathered"
    return packed.data_bytes


def close_layer(layer: nn.Module, forward: bool) -> None:
    """What reads the layer's bytes is queued; the pass goes on to the next layers or, backward, to those before."""
    if (peers := peers_of(layer)) is not None:
        peers.close(forward)


@contextmanager
def gathered(layer: nn.Module) -> Iterator[Tensor]:
    """The whole layer's bytes outside a forward pass; a sharded layer is gathered anew for as long as this lasts."""
    if (peers := peers_of(layer)) is not None:
        peers.base.forget()
    if isinstance(layer, FSDPModule):
        layer.unshard()
    try:
        yield open_layer(layer)
    finally:
        if isinstance(layer, FSDPModule):
            layer.reshard()


def own_part(layer: nn.Module) -> Tensor:
    """The bytes of a layer that this rank keeps."""
    if (peers := peers_of(layer)) is not None:
        return peers.own()
    packed = layer.packed.to_local() if isinstance(layer.packed, DTensor) else layer.packed
    assert isinstance(packed, PackedBytes)
    return packed.data_bytes


def backend_of(device_type: str) -> str:
    """The process group's backends: CPU tensors go through gloo, CUDA's through NCCL."""
    return "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"


def mesh_of_one(device: torch.device) -> DeviceMesh:
    """A mesh of this process alone: FSDP2 offloads only what it shards, so a lone rank shards over itself."""
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined] # public, but not in torch's __all__
        dist.init_process_group(backend_of(device.type), store=store, rank=0, world_size=1)
    return init_device_mesh(device.type, (1,))


def shard_layer(layer: nn.Module, mesh: DeviceMesh, strategy: Sharding, offload: bool, pin_memory: bool) -> None:
    """Shard `layer.packed` over the mesh; everything else of the layer stays whole."""
    ignored = {parameter for name, parameter in layer.named_parameters() if name != "packed"}
    policy = CPUOffloadPolicy(pin_memory=pin_memory) if offload else OffloadPolicy()
    reshard = strategy == "FULL_SHARD"
    fully_shard(layer, mesh=mesh, reshard_after_forward=reshard, offload_policy=policy, ignored_params=ignored)
    gather: Any = fully_shard.state(layer)._fsdp_param_group  # type: ignore[attr-defined] # of one parameter
    for name in ("unshard", "wait_for_unshard"):  # on a CPU the first waits for the collective
        setattr(gather, name, GATHERS.timed(getattr(gather, name)))


def shard_root(module: nn.Module, layers: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Make `module` FSDP2's root: it owns the streams and the prefetch order, and no parameter."""
    own = {id(layer.packed) for layer in layers}
    ignored = {parameter for parameter in module.parameters() if id(parameter) not in own}
    fully_shard(module, mesh=mesh, ignored_params=ignored)


def place_base(
    root: nn.Module,
    layers: nn.ModuleList,
    packed: PackedModel,
    mesh: DeviceMesh | None,
    plan: Plan,
    device: torch.device,
) -> None:
    """Load the layers' bytes onto the device, sharded over the mesh as the plan says (None: whole).

    Sets `layer.peers` or `layer.packed`. Only this rank's part is read.
    """
    sizes = [layer.size for layer in packed.layers]
    peers = None
    if mesh is not None and plan.sharding == "FULL_SHARD" and not plan.cpu_offload:
        peers = open_peers(sizes, mesh, device)
    numbers = list(range(len(layers)))
    for batch in [[number] for number in numbers] if plan.cpu_offload else [numbers]:  # there all may be too much
        parts = [peers.own(i) if peers else _empty(part_size(sizes[i], size_of(mesh)), device) for i in batch]
        starts = [rank_of(mesh) * part.numel() for part in parts]
        packed.load_layers((i, s, s + part.numel(), part) for i, s, part in zip(batch, starts, parts, strict=True))
        for index in batch:
            if peers is not None:
                layers[index].peers = PeerLayer(peers, index)  # type: ignore[assignment] # no submodule
            else:
                _hand_over(layers[index], parts.pop(0), mesh, plan)
    if peers is not None:
        peers.seal()
    elif mesh is not None:
        shard_root(root, layers, mesh)


def release_base(layers: nn.ModuleList) -> None:
    """Give up the layers' bytes, or this rank's part of them, before they are placed anew."""
    for layer in layers:
        for name in ("packed", "peers"):
            if hasattr(layer, name):
                delattr(layer, name)


def _hand_over(layer: nn.Module, part: Tensor, mesh: DeviceMesh | None, plan: Plan) -> None:
    """Make this rank's part (with a mesh FSDP2's) the layer's parameter."""
    if mesh is None:
        layer.packed = packed_parameter(part)
        return
    whole = _empty(part.numel() * mesh.size(), part.device)
    whole.chunk(mesh.size())[mesh.get_local_rank()].copy_(part)  # FSDP2 keeps this much of it
    layer.packed = packed_parameter(whole)
    shard_layer(layer, mesh, plan.sharding, plan.cpu_offload, pin_memory=part.is_cuda)


def _empty(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def rank_of(mesh: DeviceMesh | None) -> int:
    return 0 if mesh is None else mesh.get_local_rank()


def size_of(mesh: DeviceMesh | None) -> int:
    return 1 if mesh is None else mesh.size()
