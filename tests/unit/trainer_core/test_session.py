"""The micro batch comes from the memory plan, whatever the worker is given to plan with."""

from types import SimpleNamespace
from typing import Any

import pytest

from qlora_trainer.errors import BadConfig
from qlora_trainer.session import micro_batch_size, require_fit

TINY = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
}


def hf_config(values: dict[str, Any]) -> Any:
    """As much of transformers' configuration as is asked for."""
    return SimpleNamespace(to_dict=lambda: values)


def test_memory_limits_the_micro_batch_and_the_spec_overrules_it(make_config: Any) -> None:
    config = make_config(training={"globalBatchSize": 16, "maxLength": 512})
    sizes = [micro_batch_size(config, hf_config(TINY), gpu_bytes) for gpu_bytes in (0, 1 << 34, 1 << 27)]
    assert sizes == [16, 16, 1]
    config = make_config(training={"globalBatchSize": 16, "maxLength": 512, "microBatchSize": 8})
    assert micro_batch_size(config, hf_config(TINY), 1 << 27) == 8


def test_a_model_that_cannot_be_planned_for_is_the_users_to_change(make_config: Any) -> None:
    with pytest.raises(BadConfig, match="hidden_size"):
        micro_batch_size(make_config(), hf_config({}), 0)


LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


@pytest.mark.parametrize(
    ("max_nodes", "gib", "training", "says"),
    [
        (1, 24, {"cpuOffload": False, "shardingStrategy": "NO_SHARD"}, r"maxNodes \(1\) x numProcPerNode \(1\) GPUs"),
        (2, 24, {"shardingStrategy": "FULL_SHARD"}, "set training.cpuOffload: true, or add nodes"),
        (8, 24, {"shardingStrategy": "FULL_SHARD"}, None),
        (1, 24, {"maxLength": 2048}, None),  # auto: offloaded
        (1, 8, {"maxLength": 65536}, "lower training.maxLength"),
        (1, 80, {"shardingStrategy": "NO_SHARD"}, None),
        (1, 0, {"shardingStrategy": "NO_SHARD"}, None),  # no GPU, no limit
    ],
)
def test_a_run_that_fits_on_no_allowed_size_is_refused_with_what_to_change(
    max_nodes: int, gib: int, training: dict[str, Any], says: str | None, make_config: Any
) -> None:
    config = make_config(elasticPolicy={"minNodes": 1, "maxNodes": max_nodes}, training=training)
    if says is None:
        require_fit(config, hf_config(LLAMA_70B), gib << 30)
    else:
        with pytest.raises(BadConfig, match=says):
            require_fit(config, hf_config(LLAMA_70B), gib << 30)


def test_what_no_plan_knows_is_left_to_others_to_refuse(make_config: Any) -> None:
    require_fit(make_config(), hf_config({}), 1 << 30)
