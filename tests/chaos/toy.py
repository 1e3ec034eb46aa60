"""A worker that trains nothing but keeps every rule of the real one: for tests of the agent and its protocol alone."""

import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from qlora_api.run import Command, ExitCode
from qlora_api.status import Artifacts, Progress
from qlora_trainer import faults
from qlora_trainer.control import (
    Phase,
    WorkerEnv,
    WorkerState,
    read_control,
    read_worker_state,
    write_worker_state,
)
from qlora_trainer.errors import MembersChange, classify
from qlora_trainer.group import process_group
from qlora_trainer.snapshot import SnapshotSlots
from qlora_trainer.standing import Kept, next_place, stand

STEPS = int(os.environ.get("TOY_STEPS", "400"))
STEP_SECONDS = float(os.environ.get("TOY_STEP_SECONDS", "0.05"))
WARM_SECONDS = float(os.environ.get("TOY_WARM_SECONDS", "0.1"))


def warm() -> None:
    """Stands in for fetching and packing the model."""
    time.sleep(WARM_SECONDS)


def flush() -> None:
    """There is no bucket."""


def main() -> int:
    """Exit code as the real worker's; between two generations it stands as the real one does."""
    env = WorkerEnv.of_environment()
    if env.generation == 0:  # nothing to rehearse
        write_worker_state(env.run_dir, env.local_rank, WorkerState(phase=Phase.PARKED, pid=os.getpid()))
        env = next_place(env)
    kept = Kept(snapshots=SnapshotSlots(env.run_dir))
    while True:
        write_worker_state(env.run_dir, env.local_rank, WorkerState(generation=env.generation, pid=os.getpid()))
        try:
            with process_group(env):
                _count(env, kept)
            return ExitCode.OK
        except (MembersChange, RuntimeError) as error:
            told = read_worker_state(env.run_dir, env.local_rank)
            assert told is not None
            try:
                stand(error, env, kept, told.phase == Phase.TRAINING, told.progress.step)
            except RuntimeError:
                print(error, flush=True)
                return classify(error).exit_code
            write_worker_state(env.run_dir, env.local_rank, told.model_copy(update={"phase": Phase.PARKED}))
            env = next_place(env)


def _all_reduce(tensor: torch.Tensor, env: WorkerEnv, op: Any = dist.ReduceOp.SUM) -> None:
    if env.world_size > 1:
        dist.all_reduce(tensor, op=op)


def _count(env: WorkerEnv, kept: Kept) -> None:
    """Counts steps together with its peers."""
    slots = kept.snapshots
    assert slots is not None
    newest = slots.newest()
    start = torch.tensor([newest.step if newest else 0])

    def tell(phase: Phase, step: int, artifacts: Artifacts | None = None) -> None:
        progress = Progress(step=step, total_steps=STEPS, loss=1.0)
        told = WorkerState(
            generation=env.generation,
            phase=phase,
            pid=os.getpid(),
            progress=progress,
            snapshot_step=step,
            artifacts=artifacts,
            metrics={"step_seconds": 0.01} if step > int(start) else {},
        )
        write_worker_state(env.run_dir, env.local_rank, told)

    _all_reduce(start, env, dist.ReduceOp.MAX)
    state = torch.full((1000,), float(start))
    tell(Phase.TRAINING, step := int(start))
    while step < STEPS:
        control = read_control(env.run_dir)
        flag = torch.tensor([float(control.prepare > env.generation), float(control.command == Command.STOP)])
        _all_reduce(flag, env, dist.ReduceOp.MAX)
        if flag[1]:
            sys.exit(ExitCode.STOPPED)
        if flag[0]:
            slots.wait()
            raise MembersChange(f"after step {step}")
        faults.reach("forward", step + 1)
        time.sleep(STEP_SECONDS)
        faults.reach("all-reduce", step + 1)
        ones = torch.ones(1000)
        _all_reduce(ones, env)
        assert int(ones[0]) == env.world_size
        slots.wait()
        faults.reach("optimizer", step + 1)
        state += 1
        step += 1
        slots.write(step, env.generation, {"state": state.clone()}, {})
        tell(Phase.TRAINING, step)
        print(f"{time.time():.3f} rank {env.rank}/{env.world_size} generation {env.generation} step {step}", flush=True)
    slots.wait()
    _all_reduce(torch.ones(1), env)  # nobody says that it has finished before all have
    found = Artifacts(adapter_uri="file:///a", manifest_uri="file:///m", adapter_bytes=1, adapter_sha256="0" * 64)
    tell(Phase.FINISHED, step, found)
