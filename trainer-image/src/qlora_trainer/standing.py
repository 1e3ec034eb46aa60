"""A worker between two generations: out of its group, the rest of it in memory, waiting for its next place.

Rules: it goes on by its agent's word alone (an Assignment of a newer generation) and ends with its agent; what it keeps
is what a new process would have to build or load again. Whether a state survives is not decided here: the next
generation restores from snapshots and checkpoints as a new process would.
"""

import contextlib
import os
import sys
import time
from dataclasses import dataclass, replace

import torch
from torch.distributed.device_mesh import DeviceMesh

from qlora_api.layout import RunLayout
from qlora_api.run import ExitCode, TrainConfig
from qlora_trainer.control import WorkerEnv, read_assignment, read_control, write_termination
from qlora_trainer.errors import Fenced, MembersChange, OutOfMemory, classify
from qlora_trainer.loader import PackedModel
from qlora_trainer.model import TrainableModel, build_model, free_memory, move, obstacles, plan_for
from qlora_trainer.output import open_output
from qlora_trainer.snapshot import SnapshotSlots
from qlora_trainer.storage import ObjectStore

Output = tuple[ObjectStore, RunLayout]
_POLL_SECONDS = 0.02


@dataclass
class Kept:
    """What goes with a worker from one generation into the next."""

    model: TrainableModel | None = None
    snapshots: SnapshotSlots | None = None
    output: Output | None = None

    def open(self, config: TrainConfig, env: WorkerEnv) -> Output:
        """The run's store, opened once: a client takes a tenth of a second, a lookup of names and a connection."""
        self.output = self.output or open_output(config, env)
        return self.output

    def model_for(
        self, config: TrainConfig, packed: PackedModel, mesh: DeviceMesh | None, device: torch.device, micro_batch: int
    ) -> TrainableModel:
        """The model of the generation before, if it suits, or a new one. Raises BadConfig, BadModel."""
        plan = plan_for(config, packed.hf_config, mesh, device, micro_batch)
        model, self.model = self.model, None  # one that breaks on the way is not kept
        if model is not None and (why := obstacles(model, config, packed, plan)):
            print(f"the model is built anew: {', '.join(why)}", file=sys.stderr, flush=True)
            model = None
            free_memory()
        self.model = (
            move(model, config, packed, mesh, plan)
            if model is not None
            else build_model(config, packed, mesh, device, micro_batch, plan)
        )
        return self.model

    def settle(self) -> None:
        """Wait until no thread and no kernel changes what is kept; raises when the GPU can't go on."""
        if self.snapshots is not None:
            with contextlib.suppress(OSError, RuntimeError, OutOfMemory):  # one that fails now is not the newest
                self.snapshots.wait()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()


def stand(error: Exception, env: WorkerEnv, kept: Kept, trained: bool, step: int) -> None:
    """Stand after this error of one's generation, or raise it: it is one's own, or there is no agent to wait for.

    A worker that did not get as far as to train ends: what is wrong may be in its process.
    """
    if not isinstance(error, MembersChange):
        termination = classify(error, env.rank, step)
        is_others = termination.exit_code == ExitCode.LOST_PEER
        if not (is_others and trained and read_control(env.run_dir).assigns):
            raise error
        write_termination(env.run_dir, env.local_rank, termination)
    try:
        kept.settle()
    except RuntimeError as broken:
        if isinstance(error, MembersChange):
            raise  # what is broken here is this worker's own
        raise error from broken
    print(f"generation {env.generation} is over for rank {env.rank}: {error}", file=sys.stderr, flush=True)


def next_place(env: WorkerEnv) -> WorkerEnv:
    """Wait for this worker's place in a newer generation. Raises Fenced when its parent, the fork server, is gone.

    (Its agent's end is watched by workers.die_with_agent.)
    """
    parent = os.getppid()
    while os.getppid() == parent:
        place = read_assignment(env.run_dir, env.local_rank)
        if place is not None and place.generation > env.generation:
            names = {"MASTER_ADDR": place.master_addr, "MASTER_PORT": str(place.master_port)}
            os.environ.update(names, RANK=str(place.rank), WORLD_SIZE=str(place.world_size))
            return replace(
                env, rank=place.rank, world_size=place.world_size, generation=place.generation, init_method="env://"
            )
        time.sleep(_POLL_SECONDS)
    raise Fenced("the fork server is gone while this worker was parked")
