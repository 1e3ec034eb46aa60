"""How long a run of 8B's shape on two GPUs stands still: a worker lost, one that comes back, and a save.

Real workers (qlora_trainer.train), forked from the warm server as an agent forks them, on a model of random weights,
with snapshots in memory and checkpoints in a folder. `gpu_recovery.py MODEL FOLDER OUT` appends a line of JSON to OUT;
`--device cpu` runs the same on the tiny shape. The parts of a worker's start are in its log.

* `restart_s`: from the SIGKILL of one worker to the first new optimizer step, both started anew.
* `in_process_s`: from the moment the agent says that the collectives will not end to the first step that the other
  one, alone, does in its process.
* `grow_pause_s`: from its last step alone to the first one with a newcomer that has rehearsed, a step's own time taken
  off: as the kill grid counts it.
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
from qlora_trainer.workers import show_stacks_on_usr1

LENGTH, NUM_SAMPLES = 2048, 128
WARM_STEPS = 12  # before the kill: two checkpoints are done by then
SAVES = {"stall": "checkpoint_stall_seconds", "durable": "checkpoint_seconds"}
BARE = "without-snapshots"  # a file beside the pods' folders: what snapshots cost a step
LIMIT = 60.0  # seconds for anything


def timed_work(config: TrainConfig, env: WorkerEnv) -> None:
    """A worker that says when it has done what."""
    from qlora_trainer import group, loader, model, preflight, restore, session, sharding, standing, train

    begun = time.time()
    show_stacks_on_usr1()

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.time()
            result = function(*args, **kwargs)
            if env.rank == 0:
                print(f"  {time.time() - begun:6.2f} s: {name} took {time.time() - start:.2f}", file=sys.stderr)
            return result

        return call

    for module, name in (
        (group, "_join"), (preflight, "check_links"), (group, "_break_off"), (standing, "move"), (model, "free_memory"),
        (session, "prepare"), (session, "load_tokenizer"), (session, "ensure_samples"),
        (session, "ensure_packed"), (session, "ensure_model"), (standing, "build_model"), (model, "build_skeleton"),
        (model, "plan_for"), (model, "Adapter"), (model, "place_base"), (sharding, "open_peers"),
        (loader.PackedModel, "load_layers"), (loader.PackedModel, "read_rest"), (model.TrainableModel, "verify"),
        (train, "set_up"), (restore, "_from_bucket"), (restore, "_share"), (train, "restore"),
        (train, "_step"), (train, "_save"), (train, "_snapshot"),
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


def wait_for(world: World, step: int) -> None:
    world.until(lambda: step_of(world) >= step, f"step {step}", LIMIT)


def measure(world: World) -> dict[str, Any]:
    """Start twice (the second time all caches are warm), save, kill one worker, start both again."""
    result: dict[str, Any] = {"name": "recovery"}
    for _ in range(2):
        world.start([0, 1])
        begun = time.monotonic()
        wait_for(world, max(step_of(world), 0) + 1)
        result["first_step_s"] = round(time.monotonic() - begun, 2)
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


def measure_in_process(world: World) -> dict[str, Any]:
    """One of two workers is lost, the other goes on in its process; then a newcomer is let in. Plays their agents."""
    (world.root / BARE).unlink(missing_ok=True)
    world.start([0, 1])
    world.tell(0, generation=world.generation)
    wait_for(world, max(step_of(world), 0) + 1)
    wait_for(world, step_of(world) + WARM_STEPS)
    done = step_of(world)
    world.processes.pop().kill()
    begun = time.monotonic()
    world.tell(0, generation=world.generation, prepare=world.generation + 1, abandon=True)
    world.until(lambda: world.has_parked(0), "the survivor's parking", LIMIT)
    parked = time.monotonic() - begun
    world.place([0])
    wait_for(world, done + 1)
    result = {"in_process_s": round(time.monotonic() - begun, 2), "in_process_park_s": round(parked, 2)}
    world.rehearse(1)  # the same control file tells the other one's worker nothing new: it trains on
    world.tell(0, generation=world.generation, prepare=world.generation + 1)
    begun, done = time.monotonic(), step_of(world)
    while not world.has_parked(0):
        if step_of(world) > done:
            begun, done = time.monotonic(), step_of(world)
    world.place([0, 1])
    wait_for(world, done + 1)
    paused = time.monotonic() - begun
    wait_for(world, done + WARM_STEPS)
    state = world.state(0)
    assert state is not None
    result["grow_pause_s"] = round(paused - state.metrics["step_seconds"], 2)
    world.kill()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    world = make_world(options.model, options.folder, options.device)
    result = measure(world) | measure_in_process(world)
    with options.out.open("a") as out:
        out.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
