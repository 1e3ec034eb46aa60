"""The adapter put into the model: which linears get one, in which groups, and their places taken over.

Rules: linears that share an input are one group (with DoRA each its own); a linear without adapter is quantized, too.
"""

from dataclasses import replace

import torch
from torch import nn

from qlora_api.types import LoraSpec
from qlora_trainer.errors import BadConfig
from qlora_trainer.groups import GroupSpec, weight_of
from qlora_trainer.loader import PackedModel
from qlora_trainer.lora import DoraLinear, Group, GroupPlan, QuantLinear
from qlora_trainer.sharding import gathered
from qlora_trainer.skeleton import group_linears, is_target

# Models whose layer ends in `residual + last_linear(x)`: addition saves nothing, so a recomputation can stop before it.
LAST_IS_RESIDUAL = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3"})


def plan_groups(lora: LoraSpec, packed: PackedModel) -> list[GroupPlan]:
    """The groups of all layers in order. Raises BadConfig when no linear gets an adapter."""
    scale = lora.alpha / (lora.r**0.5 if lora.use_rslora else lora.r)
    plans = []
    for index, layer in enumerate(packed.layers):
        path = f"{packed.prefix}.{index}"
        names = list(layer.linears)
        groups = [(name,) for name in names] if lora.use_dora else group_linears(names)
        for group in groups:
            adapted = tuple(is_target(f"{path}.{name}", lora.target_modules) for name in group)
            members = tuple(layer.linears[name] for name in group)
            dropout = lora.dropout if any(adapted) else 0.0
            plans.append(
                GroupPlan(index, path, group, GroupSpec(members, adapted, packed.scheme, lora.r, scale, dropout))
            )
        if packed.hf_config.model_type in LAST_IS_RESIDUAL and not lora.use_dora:
            plans[-1] = replace(plans[-1], spec=replace(plans[-1].spec, last=True))
    if not any(any(plan.spec.adapted) for plan in plans):
        known = sorted({name.rpartition(".")[2] for name in packed.layers[0].linears})
        raise BadConfig(f"lora.targetModules {lora.target_modules} match no linear of the model: it has {known}")
    return plans


def replace_linears(layers: nn.ModuleList, groups: list[Group], dora: bool) -> None:
    """Put the groups in the places of their linears; each keeps the linear's bias."""
    for number, layer in enumerate(layers):
        mine = [group for group in groups if group.plan.layer == number]
        layer.qlora_groups = nn.ModuleList(mine)
        for group in mine:
            for index, name in enumerate(group.plan.names):
                linear = layer.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                use_dora = dora and group.plan.spec.adapted[index]
                replacement = DoraLinear(group, linear.bias) if use_dora else QuantLinear(group, index, linear.bias)
                layer.set_submodule(name, replacement)


def measure_magnitudes(layers: nn.ModuleList, groups: list[Group]) -> None:
    """DoRA's start: the magnitudes are the row norms of the base (arXiv:2402.09353, section 4.1)."""
    for number, layer in enumerate(layers):
        with gathered(layer) as blob, torch.no_grad():
            for group in groups:
                if group.plan.layer == number and any(group.plan.spec.adapted):
                    group.magnitude.copy_(weight_of(blob, group.key, group.dtype).float().norm(dim=1))
