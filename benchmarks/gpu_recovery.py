"""How long a run of 8B's shape on two GPUs stands still: a worker killed and started again, and a save.

Real workers (qlora_trainer.train), forked from the warm server as an agent forks them, on a model of random weights,
with snapshots in memory and checkpoints in a folder. `gpu_recovery.py MODEL FOLDER OUT` appends a line of JSON to OUT;
`--device cpu` runs the same on the tiny shape. The clock of `restart_s` starts at the SIGKILL and ends with the first
new optimizer step; the parts of a worker's start are in its log.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_shapes import words_tokenizer
from tests.worlds import PRELOAD, World, make_config

from qlora_api.run import TrainConfig
from qlora_trainer.control import WorkerEnv

LENGTH, NUM_SAMPLES = 2048, 128
WARM_STEPS = 12  # before the kill: two checkpoints are done by then
SAVES = {"stall": "checkpoint_stall_seconds", "durable": "checkpoint_seconds"}
BARE = "without-snapshots"  # a file beside the pods' folders: what snapshots cost a step
LIMIT = 150.0  # seconds for anything


def timed_work(config: TrainConfig, env: WorkerEnv) -> None:
    """A worker that says when it has done what."""
    from qlora_trainer import loader, model, session, sharding, train

    begun = time.time()

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.time()
            result = function(*args, **kwargs)
            if env.rank == 0:
                print(f"  {time.time() - begun:6.2f} s: {name} took {time.time() - start:.2f}", file=sys.stderr)
            return result

        return call

    for module, name in (
        (session, "_join"), (session, "prepare"), (session, "load_tokenizer"), (session, "ensure_samples"),
        (session, "ensure_packed"), (session, "ensure_model"), (session, "build_model"), (model, "build_skeleton"),
        (model, "plan_for"), (model, "Adapter"), (model, "place_base"), (sharding, "open_peers"),
        (loader.PackedModel, "load_layers"), (loader.PackedModel, "read_rest"), (model.TrainableModel, "verify"),
        (train, "set_up"), (train, "restore"), (train, "_step"), (train, "_save"), (train, "_snapshot"),
    ):  # fmt: skip
        setattr(module, name, timed(name, getattr(module, name)))
    if (env.run_dir.parent / BARE).exists():
        train._snapshot = lambda session, position: None
    train.work(config, env)


def make_world(model: Path, folder: Path, device: str) -> World:
    """Two workers in one pod; samples of 2,048 tokens."""
    folder.mkdir(parents=True)
    if not (model / "tokenizer.json").exists():
        words_tokenizer().save_pretrained(model)
    length = LENGTH if device == "cuda" else 32
    rows = [{"text": " ".join(f"t{(i * 7 + k) % 1000}" for k in range(length))} for i in range(NUM_SAMPLES)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dtype = {"computeDtype": "bfloat16", "storageDtype": "bfloat16"}
    config = make_config(
        model,
        folder / "data.jsonl",
        f"file://{folder}/bucket",
        dataset={"evalFraction": 0.0},
        quantization=dtype,
        lora={"r": 16, "alpha": 32},
        training={
            "maxSteps": 10_000, "globalBatchSize": 8, "microBatchSize": 4, "maxLength": length,
            "gradientCheckpointing": "none", "learningRate": 1e-4,
        },
        checkpoint={"intervalSteps": 5},
    )  # fmt: skip
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    return World(folder, config, device_type=device, one_pod=True, entry=timed_work)


def step_of(world: World) -> int:
    """Of rank 0 in this generation; -1 before its first report."""
    state = world.state(0)
    return state.progress.step if state and state.generation == world.generation else -1


def wait_for(world: World, step: int) -> float:
    """Seconds until `step` is done."""
    begun = time.monotonic()
    while step_of(world) < step:
        if time.monotonic() - begun > LIMIT or any(process.exitcode is not None for process in world.processes):
            raise SystemExit(f"no step {step} within {LIMIT} s: {[p.exitcode for p in world.processes]}")
        time.sleep(0.005)
    return time.monotonic() - begun


def measure(world: World) -> dict[str, Any]:
    """Start twice (the second time all caches are warm), save, kill one worker, start both again."""
    result: dict[str, Any] = {"name": "recovery"}
    for _ in range(2):
        world.start([0, 1])
        result["first_step_s"] = round(wait_for(world, max(step_of(world), 0) + 1), 2)
        wait_for(world, step_of(world) + WARM_STEPS)
        state = world.state(0)
        assert state is not None
        result["metrics"] = state.metrics
        done = step_of(world)
        begun = time.monotonic()
        world.processes[1].kill()
        world.kill()  # as its agent does: the collectives of the other one are broken
        world.start([0, 1])
        wait_for(world, done + 1)
        result["restart_s"] = round(time.monotonic() - begun, 2)
        world.kill()
        print(json.dumps(result), flush=True)
    (world.root / BARE).touch()
    world.start([0, 1])
    wait_for(world, 1)
    wait_for(world, step_of(world) + WARM_STEPS)
    state = world.state(0)
    assert state is not None
    world.kill()
    saves = {f"save_{short}_s": result["metrics"][name] for short, name in SAVES.items()}
    return result | saves | {"bare_step_s": state.metrics["step_seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    result = measure(make_world(options.model, options.folder, options.device))
    with options.out.open("a") as out:
        out.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
