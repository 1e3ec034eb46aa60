"""transformers' model without its weights: which linears there are, in which decoder layer, which share an input.

Rules: nothing here allocates a weight; any causal language model whose decoder layers hold `nn.Linear` modules works.
"""

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_trainer.errors import BadModel

if TYPE_CHECKING:

    class CausalLM(nn.Module):
        """What is used of transformers' PreTrainedModel (mypy follows none of transformers' imports)."""

        config: Any
        base_model: nn.Module

        def get_input_embeddings(self) -> nn.Embedding: ...
        def get_output_embeddings(self) -> nn.Linear | None: ...
        def tie_weights(self) -> None: ...
else:
    CausalLM = nn.Module

# Siblings of one module that read the same input: computed as one product, the first caller for all.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)  # their weights have three dimensions and stay as they are
_CAPPED = "attn_logit_softcapping"
_building = threading.Lock()  # accelerate's context patches nn.Module for all threads


def read_hf_config(model_dir: Path, trust_remote_code: bool = False) -> Any:
    """The model's configuration (transformers' PreTrainedConfig). Raises BadModel."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model_dir, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise BadModel(f"{model_dir}: no readable config.json ({error}): name a folder of a causal LM") from error


def build_skeleton(
    hf_config: Any, dtype: torch.dtype, trust_remote_code: bool = False, attention: str | None = None
) -> CausalLM:
    """The causal LM with its parameters on the meta device and its buffers real, on the CPU."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    hf_config = copy.deepcopy(hf_config)  # the caller writes its own into folders that others load
    hf_config.use_cache = False
    capped = getattr(hf_config, _CAPPED, None) is not None  # Gemma 2: only the eager attention caps scores
    attention = "eager" if capped else attention
    options = {} if attention is None else {"attn_implementation": attention}
    try:
        with _building, init_empty_weights(include_buffers=False):
            model: CausalLM = AutoModelForCausalLM.from_config(
                hf_config, dtype=dtype, trust_remote_code=trust_remote_code, **options
            )
    except ValueError as error:
        raise BadModel(f"transformers has no causal LM for this configuration: {error}") from error
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    _require_dense(model)
    if next(decoder_linears(model), None) is None:
        raise BadModel(f"{type(model).__name__} has no nn.Linear in its decoder layers: QLoRA has nothing to quantize")
    return model


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and modules of the decoder layers: the module list with the most parameters."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise BadModel(f"{type(model).__name__} has no list of decoder layers")
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def decoder_linears(model: nn.Module) -> Iterator[tuple[int, str, nn.Linear]]:
    """(layer index, name within the layer, module) of every linear of the decoder layers, in module order."""
    for index, layer in enumerate(decoder_layers(model)[1]):
        for name, module in layer.named_modules():
            if type(module) is nn.Linear:
                yield index, name, module


def _require_dense(model: nn.Module) -> None:
    """Raises BadModel for experts: transformers fuses their weights into one, which is no `nn.Linear`."""
    prefix, layers = decoder_layers(model)
    for path, module in layers.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 2 and parameter.is_floating_point() and not isinstance(module, _CONVOLUTIONS):
                raise BadModel(
                    f"{type(model).__name__}: {prefix}.{path}.{name} has shape {tuple(parameter.shape)};"
                    " mixture-of-experts models are not supported yet: choose a dense model"
                )


def group_linears(names: list[str]) -> list[tuple[str, ...]]:
    """Names of a layer's linears in order, siblings that share their input together (`self_attn.q_proj`, ...)."""
    groups: list[tuple[str, ...]] = []
    taken: set[str] = set()
    for name in names:
        if name in taken:
            continue
        parent, _, leaf = name.rpartition(".")
        prefix = f"{parent}." if parent else ""
        family = next((s for s in SIBLINGS if leaf in s), (leaf,))
        group = tuple(prefix + sibling for sibling in family if prefix + sibling in names)
        groups.append(group)
        taken.update(group)
    return groups


def is_target(module_path: str, targets: list[str]) -> bool:
    """Whether an adapter belongs on this linear: `all-linear`, or a name or path suffix as in PEFT."""
    return targets == ["all-linear"] or any(module_path == t or module_path.endswith(f".{t}") for t in targets)
