"""How a decoder layer runs: compiled, its activations kept or recomputed, its gathered bytes handed to its linears.

Rules: the forward stays transformers' own; evaluation never compiles and never recomputes; a recomputation makes
nothing that the backward pass does not read.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlora_trainer import ops
from qlora_trainer.lora import LayerState
from qlora_trainer.sharding import close_layer, open_layer, peers_of

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
    """A decoder layer's forward, inside FSDP2's hooks if it has any: hand its bytes over, recompute if asked to.

    `forwards`: for training and for evaluation.
    """
    state.blob = open_layer(layer)
    if not torch.is_grad_enabled():
        output = forwards[1](*args, **kwargs)
    elif recompute:
        output = checkpoint(
            forwards[0], *args, use_reentrant=False, preserve_rng_state=False, context_fn=_recompute_contexts, **kwargs
        )
    else:
        output = forwards[0](*args, **kwargs)
    close_layer(layer, forward=True)
    if peers_of(layer) is not None and torch.is_grad_enabled():
        _open_in_backward(layer, args[0], output if isinstance(output, Tensor) else output[0])
    return output


def _open_in_backward(layer: nn.Module, x: Tensor, y: Tensor) -> None:
    """The backward pass comes to the layer with its output's gradient and leaves it with its input's."""

    def come(_: Tensor) -> None:
        open_layer(layer)

    def leave(_: Tensor) -> None:
        close_layer(layer, forward=False)

    y.register_hook(come)
    if x.requires_grad:
        x.register_hook(leave)


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
