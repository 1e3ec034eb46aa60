"""The worker on GPUs: one card and two, restarts, 8-bit optimizers, a large state, an offloaded base, a merge."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_api.run import Command, ExitCode
from qlora_trainer import merge
from qlora_trainer.measures import peak_flops
from qlora_trainer.session import prepare

MakeWorld = Callable[..., Any]
NO_EVAL = {"evalFraction": 0.0}
BFLOAT16 = {"computeDtype": "bfloat16", "storageDtype": "bfloat16"}


def gpu_world(make_world: MakeWorld, name: str, *, num_gpus: int = 2, **spec: Any) -> Any:
    """One pod whose workers, at most `num_gpus`, have a GPU each."""
    assert torch.cuda.device_count() >= num_gpus, f"this test needs {num_gpus} GPUs: run it on such a node"
    world = make_world(name, **{"dataset": NO_EVAL, **spec})
    world.device_type, world.one_pod = "cuda", True
    return world


def losses(world: Any) -> list[float]:
    metrics = world.adapter_folder() / "metrics.json"
    return [point[1] for point in json.loads(metrics.read_text())["history"]["points"]]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 5e-3), ("float16", 5e-3)])
def test_two_cards_are_one_card(make_world: MakeWorld, dtype: str, tolerance: float) -> None:
    quantization = {"computeDtype": dtype, "storageDtype": dtype}
    training = {"maxSteps": 8, "learningRate": 2e-3}
    one = gpu_world(make_world, "one", quantization=quantization, training=training)
    two = gpu_world(make_world, "two", quantization=quantization, training=training)
    assert one.run([0]) == [0] and two.run([0, 1]) == [0, 0]
    torch.testing.assert_close(torch.tensor(losses(two)), torch.tensor(losses(one)), rtol=tolerance, atol=0)
    assert losses(one)[-1] < losses(one)[0] - 0.02


def test_restarts_are_bit_equal(make_world: MakeWorld) -> None:
    straight = gpu_world(make_world, "straight", quantization=BFLOAT16)
    broken = gpu_world(make_world, "broken", quantization=BFLOAT16)
    assert straight.run([0, 1]) == [0, 0]
    for _ in range(2):
        assert broken.run([0, 1], Command.STOP) == [ExitCode.STOPPED] * 2
    assert broken.run([0, 1]) == [0, 0]
    assert all(torch.equal(broken.adapter()[name], tensor) for name, tensor in straight.adapter().items())


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_8bit_optimizers_go_on_from_a_checkpoint(make_world: MakeWorld, optimizer: str) -> None:
    spec = {"training": {"optimizer": optimizer}, "lora": {"r": 64}, "quantization": BFLOAT16}
    straight, broken = (gpu_world(make_world, name, num_gpus=1, **spec) for name in ("straight", "broken"))
    assert straight.run([0]) == [0]
    for _ in range(2):
        assert broken.run([0], Command.STOP) == [ExitCode.STOPPED]
    for slot in (broken.root / "pod-0").glob("snapshot-*"):
        slot.unlink()  # from the bucket, not from memory
    assert broken.run([0]) == [0]
    assert all(torch.equal(broken.adapter()[name], tensor) for name, tensor in straight.adapter().items())


def test_an_offloaded_base_trains_as_one_on_the_card(make_world: MakeWorld) -> None:
    held = gpu_world(make_world, "held", num_gpus=1, training={"maxSteps": 20})
    offloaded = gpu_world(make_world, "offloaded", num_gpus=1, training={"maxSteps": 20, "cpuOffload": True})
    assert held.run([0]) == [0] and offloaded.run([0]) == [0]
    torch.testing.assert_close(torch.tensor(losses(offloaded)), torch.tensor(losses(held)), rtol=1e-4, atol=0)
    waited = offloaded.state(0).metrics["gather_wait_seconds"]  # of one step, timed by events on the stream
    assert 0 < waited < 10 and "gather_wait_seconds" not in held.state(0).metrics


def test_a_run_with_evaluation_is_measured_and_merged(make_world: MakeWorld, tmp_path: Path) -> None:
    sections = {"dataset": {"evalFraction": 0.1}, "output": {"merge": True}, "quantization": BFLOAT16}
    world = gpu_world(make_world, "one", num_gpus=1, **sections)
    assert world.run([0]) == [0]
    figures = world.state(0).metrics
    for name in ("gpu_memory_bytes", "gpu_memory_steady_bytes", "gpu_memory_save_bytes", "flops_per_second"):
        assert figures[name] > 0, name
    assert {"data_wait_seconds", "all_reduce_seconds"} <= set(figures)
    assert 0 < figures.get("mfu", 0) < 1 or peak_flops(torch.cuda.get_device_name()) is None
    prepared = prepare(world.config, world.env(0))
    on_cpu = list(
        merge.merge(prepared.packed, world.adapter_folder(), prepared.model.path, tmp_path, torch.device("cpu"))
    )
    on_card = world.root / "bucket/run-01234567/merged/gen-00001"
    for path in (path for path in on_cpu if path.suffix == ".safetensors"):
        expected, found = load_file(path), load_file(on_card / path.name)
        assert expected.keys() == found.keys()
        for name in expected:  # sums in another order: one unit in the last place
            torch.testing.assert_close(found[name], expected[name], rtol=2**-7, atol=1e-6)


def test_half_a_gigabyte_of_state(make_world: MakeWorld, make_model: Callable[..., None], tmp_path: Path) -> None:
    """An adapter of 8B's size (42 million parameters): saved while it trains, restored from the bucket bit-equal."""
    shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 12, "num_attention_heads": 16}
    make_model(tmp_path / "wide", **shape)
    spec = {
        "quantization": BFLOAT16,
        "lora": {"r": 48},
        "training": {"maxSteps": 20},
        "checkpoint": {"intervalSteps": 5},
    }
    straight, broken = (gpu_world(make_world, name, base=tmp_path / "wide", **spec) for name in ("straight", "broken"))
    assert straight.run([0, 1]) == [0, 0]
    print({name: value for name, value in straight.state(0).metrics.items() if "checkpoint" in name})
    assert broken.run([0, 1], Command.STOP) == [ExitCode.STOPPED] * 2
    for slot in (broken.root / "pod-0").glob("snapshot-*"):
        slot.unlink()
    assert broken.run([0, 1]) == [0, 0]
    assert all(torch.equal(broken.adapter()[name], tensor) for name, tensor in straight.adapter().items())
