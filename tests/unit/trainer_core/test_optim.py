"""AdamW over the flat master equals torch's over the single parameters; the schedule equals transformers'."""

from typing import Any

import pytest
import torch
from torch import nn

from qlora_trainer.errors import BadConfig
from qlora_trainer.lora import NUM_EXTRA
from qlora_trainer.optim import Optimizer, learning_rate_factor

SHAPES = {"l.lora_A.weight": (3, 5), "k.lora_A.weight": (3, 7), "l.lora_B.weight": (5, 3), "k.lora_B.weight": (7, 3)}


class FlatAdapter:
    """The part of lora.Adapter that the optimizer sees: all A, then all B, in one buffer."""

    def __init__(self, freeze_a: bool = False) -> None:
        numel = sum(a * b for a, b in SHAPES.values())
        self.master = torch.randn(numel, generator=torch.Generator().manual_seed(0))
        self.reduced = torch.zeros(numel + NUM_EXTRA)
        self.grad = self.reduced[:numel]
        self.num_a, self.freeze_a = 3 * 5 + 3 * 7, freeze_a
        self.trainable: dict[str, nn.Parameter] = {}
        at = 0
        for name, (rows, columns) in SHAPES.items():
            if not (freeze_a and ".lora_A." in name):
                self.trainable[name] = nn.Parameter(self.master[at : at + rows * columns].view(rows, columns))
                self.trainable[name].grad = self.grad[at : at + rows * columns].view(rows, columns)
            at += rows * columns


@pytest.mark.parametrize("plus", [1.0, 16.0])
@pytest.mark.parametrize("freeze_a", [False, True])
def test_equals_torch_adamw(make_config: Any, plus: float, freeze_a: bool) -> None:
    training = {"learningRate": 0.01, "weightDecay": 0.1, "maxGradNorm": 0.5, "warmupRatio": 0.2}
    config = make_config(training=training, lora={"loraPlusRatio": plus, "freezeA": freeze_a})
    adapter = FlatAdapter(freeze_a)
    theirs = {name: nn.Parameter(p.detach().clone()) for name, p in adapter.trainable.items()}
    rates = {n: plus if ".lora_B." in n else 1.0 for n in theirs}
    reference = torch.optim.AdamW([{"params": [p], "lr": 0.01 * rates[n]} for n, p in theirs.items()], weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(reference, lambda s: learning_rate_factor(config.spec.training, s, 10))
    ours = Optimizer(config, adapter, world_size=1)  # type: ignore[arg-type]
    for step in range(4):
        ours.zero_grad()
        for i, (name, parameter) in enumerate(theirs.items()):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 * step + i))
            adapter.trainable[name].grad += parameter.grad  # type: ignore[operator]
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5)
        reference.step()
        schedule.step()
        assert ours.step(step, 10)[0] == pytest.approx(norm.item(), rel=1e-6)
    for name, parameter in theirs.items():
        torch.testing.assert_close(adapter.trainable[name].data, parameter.data, rtol=1e-6, atol=1e-7)


def test_state_goes_on_bit_equal(make_config: Any) -> None:
    def step(optimizer: Optimizer, adapter: FlatAdapter, number: int) -> None:
        adapter.grad.copy_(torch.randn(adapter.grad.shape, generator=torch.Generator().manual_seed(number)))
        optimizer.step(number, 10)

    adapter = FlatAdapter()
    optimizer = Optimizer(make_config(), adapter, 1)  # type: ignore[arg-type]
    for number in range(3):
        step(optimizer, adapter, number)
    saved = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    step(optimizer, adapter, 3)
    resumed = FlatAdapter()
    other = Optimizer(make_config(), resumed, 1)  # type: ignore[arg-type]
    other.load_state(saved, 3)
    step(other, resumed, 3)
    assert torch.equal(adapter.master, resumed.master)
    with pytest.raises(ValueError, match="belongs to another run"):
        other.load_state({"adapter.master": torch.zeros(3)}, 3)


@pytest.mark.parametrize("freeze_a", [False, True])
def test_the_best_adapter_is_part_of_the_state(make_config: Any, freeze_a: bool) -> None:
    config = make_config(training={"earlyStoppingPatience": 2}, lora={"freezeA": freeze_a})
    adapter, resumed = FlatAdapter(freeze_a), FlatAdapter(freeze_a)
    optimizer, other = (Optimizer(config, each, 1) for each in (adapter, resumed))  # type: ignore[arg-type]
    adapter.grad.fill_(1.0)
    optimizer.step(0, 10)
    optimizer.keep_best()
    best = adapter.master.clone()
    optimizer.step(1, 10)
    other.load_state(optimizer.state(), 2)
    assert torch.equal(resumed.master, adapter.master) and not torch.equal(resumed.master, best)
    other.load_best()
    assert torch.equal(resumed.master, best)


def test_loss_and_flags_travel_with_the_gradients(make_config: Any) -> None:
    adapter = FlatAdapter()
    optimizer = Optimizer(make_config(), adapter, 1)  # type: ignore[arg-type]
    optimizer.add_loss(torch.tensor(1.5))
    optimizer.add_loss(torch.tensor(0.25))
    optimizer.set_flags(False, True, False)
    assert optimizer.all_reduce() == (1.75, [False, True, False])
    optimizer.zero_grad()
    assert optimizer.all_reduce() == (0.0, [False, False, False])


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.25])
def test_schedules_are_transformers(make_config: Any, kind: str, warmup: float) -> None:
    from transformers import get_scheduler

    spec = make_config(training={"lrScheduler": kind, "warmupRatio": warmup}).spec.training
    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    name = {"constant": "constant_with_warmup"}.get(kind, kind)
    theirs = get_scheduler(name, dummy, num_warmup_steps=-(-40 * warmup // 1), num_training_steps=40)
    for step in range(40):
        assert learning_rate_factor(spec, step, 40) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        dummy.step()
        theirs.step()


def test_a_run_of_one_step_learns(make_config: Any) -> None:
    assert learning_rate_factor(make_config().spec.training, 0, 1) == 1.0


def test_optimizers_that_cannot_work_here(make_config: Any) -> None:
    paged = make_config(training={"optimizer": "paged_adamw_8bit"})
    with pytest.raises(BadConfig, match=r"cannot be checkpointed when sharded.*one GPU"):
        Optimizer(paged, FlatAdapter(), 2)  # type: ignore[arg-type]
    with pytest.raises(BadConfig, match="needs a CUDA GPU"):
        Optimizer(make_config(training={"optimizer": "adamw_8bit"}), FlatAdapter(), 1)  # type: ignore[arg-type]
