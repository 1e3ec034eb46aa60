"""How a step's sequences are cut for the members."""

from typing import Any

import pytest

from qlora_trainer.session import micro_batch_size


@pytest.mark.parametrize(
    ("training", "nodes", "gpus", "expected"),
    [
        ({"globalBatchSize": 16, "maxLength": 128}, 1, 1, 16),  # fits at once
        ({"globalBatchSize": 16, "maxLength": 2048}, 1, 1, 4),  # as many tokens as a forward pass takes
        ({"globalBatchSize": 16, "maxLength": 2048}, 4, 2, 2),  # one for each GPU
        ({"globalBatchSize": 4, "maxLength": 128}, 2, 1, 2),
        ({"globalBatchSize": 2, "maxLength": 128}, 8, 8, 1),  # more GPUs than sequences
        ({"globalBatchSize": 15, "maxLength": 128}, 2, 1, 5),  # a divisor
        ({"globalBatchSize": 16, "microBatchSize": 8, "maxLength": 128}, 4, 8, 8),  # the spec's word
    ],
)
def test_no_gpu_of_the_largest_world_is_left_without_work(
    make_config: Any, training: dict[str, Any], nodes: int, gpus: int, expected: int
) -> None:
    config = make_config(training=training, elasticPolicy={"maxNodes": nodes})
    spec = config.spec.model_copy(update={"num_proc_per_node": gpus})
    assert micro_batch_size(config.model_copy(update={"spec": spec})) == expected
