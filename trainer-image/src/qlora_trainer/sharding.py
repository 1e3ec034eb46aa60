"""A decoder layer's packed bytes as one FSDP2-sharded parameter.

Rules: the bytes travel as integers through FSDP2's tensor-subclass hooks. Viewed as bfloat16 they come back damaged on
CUDA (NaN patterns are canonicalized on the way in: bitsandbytes#1945, pytorch#159333), and a plain uint8 parameter is
refused; so `PackedBytes` wears a floating type outside and hands over its bytes.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.utils import _pytree as pytree

from qlora_api.footprint import Sharding

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


def layer_bytes(layer: nn.Module) -> Tensor:
    """The whole layer's bytes (uint8, 1-D), while it is gathered."""
    packed = layer.packed
    assert isinstance(packed, PackedBytes), "the layer is not gathered"
    return packed.data_bytes


@contextmanager
def gathered(layer: nn.Module) -> Iterator[Tensor]:
    """The whole layer's bytes outside a forward pass; a sharded layer is gathered for as long as this lasts."""
    if isinstance(layer, FSDPModule):
        layer.unshard()
    try:
        yield layer_bytes(layer)
    finally:
        if isinstance(layer, FSDPModule):
            layer.reshard()


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


def shard_root(module: nn.Module, layers: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Make `module` FSDP2's root: it owns the streams and the prefetch order, and no parameter."""
    own = {id(layer.packed) for layer in layers}
    ignored = {parameter for parameter in module.parameters() if id(parameter) not in own}
    fully_shard(module, mesh=mesh, ignored_params=ignored)
