"""A worker that trains nothing but keeps every rule of the real one: for tests of the agent and its protocol alone."""

import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from qlora_api.run import Command, ExitCode
from qlora_api.status import Artifacts, Progress
from qlora_trainer import faults
from qlora_trainer.control import Phase, WorkerEnv, WorkerState, read_control, write_worker_state
from qlora_trainer.errors import MembersChange
from qlora_trainer.snapshot import SnapshotSlots
from qlora_trainer.standing import next_place

STEPS = int(os.environ.get("TOY_STEPS", "400"))
STEP_SECONDS = float(os.environ.get("TOY_STEP_SECONDS", "0.05"))
WARM_SECONDS = float(os.environ.get("TOY_WARM_SECONDS", "0.1"))


def warm() -> None:
    """Stands in for fetching and packing the model."""
    time.sleep(WARM_SECONDS)


def flush() -> None:
    """There is no bucket."""


def main() -> int:
    """Exit code as the real worker's."""
    env = WorkerEnv.of_environment()
    if env.generation == 0:  # nothing to rehearse
        write_worker_state(env.run_dir, env.local_rank, WorkerState(phase=Phase.PARKED, pid=os.getpid()))
        env = next_place(env)
    while True:
        try:
            _count(env)
            return ExitCode.OK
        except MembersChange:
            env = next_place(env)
        except RuntimeError as error:  # a collective broke
            print(error, flush=True)
            return ExitCode.LOST_PEER


def _count(env: WorkerEnv) -> None:
    """Counts steps together with its peers."""
    slots = SnapshotSlots(env.run_dir)
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
        )
        write_worker_state(env.run_dir, env.local_rank, told)

    tell(Phase.STARTING, int(start))
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    dist.all_reduce(start, op=dist.ReduceOp.MAX)
    state = torch.full((1000,), float(start))
    tell(Phase.TRAINING, step := int(start))
    while step < STEPS:
        control = read_control(env.run_dir)
        flag = torch.tensor([float(control.prepare > env.generation), float(control.command == Command.STOP)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if flag[1]:
            sys.exit(ExitCode.STOPPED)
        if flag[0]:
            slots.wait()
            dist.destroy_process_group()
            tell(Phase.PARKED, step)
            raise MembersChange
        faults.reach("forward", step + 1)
        time.sleep(STEP_SECONDS)
        faults.reach("all-reduce", step + 1)
        ones = torch.ones(1000)
        dist.all_reduce(ones)
        assert int(ones[0]) == env.world_size
        slots.wait()
        faults.reach("optimizer", step + 1)
        state += 1
        step += 1
        slots.write(step, env.generation, {"state": state.clone()}, {})
        tell(Phase.TRAINING, step)
        print(f"{time.time():.3f} rank {env.rank}/{env.world_size} generation {env.generation} step {step}", flush=True)
    slots.wait()
    dist.barrier()
    found = Artifacts(adapter_uri="file:///a", manifest_uri="file:///m", adapter_bytes=1, adapter_sha256="0" * 64)
    tell(Phase.FINISHED, step, found)
