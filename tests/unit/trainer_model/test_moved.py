"""A model that goes on in another generation: what keeps it from that, and that it is as good as new."""

import pytest
import torch
from tests.sources import source_of

from qlora_trainer.loader import ensure_packed
from qlora_trainer.model import build_model, move, obstacles, plan_for

CPU = torch.device("cpu")


@pytest.fixture
def trained(config_of, checkpoint, cache):
    """(config, packed base, plan, model after a backward pass with an adapter that is no longer the first one)."""
    config = config_of()
    packed = ensure_packed(config, source_of(checkpoint()), cache, CPU)
    model = build_model(config, packed, None, CPU, 1)
    for parameter in model.trainable.values():
        parameter.data += 0.01
    loss_of(model).backward()
    return config, packed, plan_for(config, packed.hf_config, None, CPU, 1), model


def loss_of(model):
    ids = torch.randint(1, 300, (2, 24), generator=torch.Generator().manual_seed(7))
    model.set_step_seed(0, 0, 0)
    return model.loss(ids, ids, None, ids.numel() - len(ids))


def test_it_is_bit_equal_to_a_new_one(trained):
    config, packed, plan, model = trained
    moved, new = move(model, config, packed, None, plan), build_model(config, packed, None, CPU, 1)
    assert moved is model
    for name, parameter in new.trainable.items():
        assert torch.equal(moved.trainable[name], parameter), name
    losses = [loss_of(each) for each in (moved, new)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    assert torch.equal(moved.flat_grad, new.flat_grad)
    moved.verify()


@pytest.mark.parametrize(
    ("sections", "changes", "reasons"),
    [
        ({}, {}, []),
        ({"elastic_policy": {"minNodes": 1, "maxNodes": 7}, "checkpoint": {"keep": 9}}, {}, []),
        ({"lora": {"r": 8}}, {}, ["another spec"]),
        ({"training": {"learningRate": 1.0}}, {}, ["another spec"]),
        ({}, {"recomputed_layers": 1}, ["another memory plan"]),
        ({}, {"sharding": "FULL_SHARD"}, []),
        ({"lora": {"useDora": True}}, {}, ["another spec", "its magnitudes are measured at the start"]),
    ],
)
def test_what_keeps_it_from_going_on(trained, config_of, sections, changes, reasons):
    _, packed, plan, model = trained
    assert obstacles(model, config_of(**sections), packed, plan.model_copy(update=changes)) == reasons


def test_another_base_is_an_obstacle(trained, config_of, checkpoint, tmp_path):
    config, _, plan, model = trained
    other = ensure_packed(config, source_of(checkpoint("llama-tied")), tmp_path, CPU)
    assert obstacles(model, config, other, plan) == ["another base"]
