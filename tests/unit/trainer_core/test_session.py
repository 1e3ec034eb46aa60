"""The micro batch comes from the memory plan, whatever the worker is given to plan with."""

from types import SimpleNamespace
from typing import Any

import pytest

from qlora_trainer.errors import BadConfig
from qlora_trainer.session import micro_batch_size

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
