"""How a decoder layer runs: compiled, its activations kept or recomputed, its gathered bytes handed to its linears.

Rules: the forward stays transformers' own; evaluation never compiles and never recomputes; a recomputation makes
nothing that the backward pass does not read.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora_trainer import ops
from qlora_trainer.lora import LayerState
from qlora_trainer.sharding import layer_bytes

ENV_COMPILE = "QLORA_COMPILE"  # "0" or "1": overrides whether the layers are compiled
Forwards = tuple[Callable[..., Any], Callable[..., Any]]


def compiles(device: torch.device) -> bool:
    """Whether decoder layers and the loss are compiled: on GPUs, unless ENV_COMPILE says otherwise."""
    return os.environ.get(ENV_COMPILE, "1" if device.type == "cuda" else "0") == "1"


def set_forward(layer: nn.Module, state: LayerState, recompute: bool, compiled: bool) -> None:
    """Replace the layer's forward. Compiled for training only, and once: all layers share their code and its guards."""
    forward = layer.forward
    trained = torch.compile(forward, dynamic=False) if compiled else forward
    layer.forward = partial(_run_layer, (trained, forward), layer, state, recompute)


def _run_layer(
    forwards: Forwards,
    layer: nn.Module,
    state: LayerState,
    recompute: bool,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """A decoder layer's forward, inside FSDP2's hooks: hand the gathered bytes over, recompute if asked to.

    `forwards`: for training and for evaluation.
    """
    state.blob = layer_bytes(layer)
    if not torch.is_grad_enabled():
        return forwards[1](*args, **kwargs)
    if not recompute:
        return forwards[0](*args, **kwargs)
    return checkpoint(
        forwards[0], *args, use_reentrant=False, preserve_rng_state=False, context_fn=_recompute_contexts, **kwargs
    )


class _Recomputing:
    """Tells the operators that a checkpoint recomputes, so that outputs nobody needs again are skipped."""

    def __enter__(self) -> None:
        ops.recompute_skips_output = True

    def __exit__(self, *error: object) -> None:
        ops.recompute_skips_output = False


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def _recompute_contexts() -> tuple[_Nothing, _Recomputing]:
    return _Nothing(), _Recomputing()
