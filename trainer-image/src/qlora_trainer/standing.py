"""A worker between two generations: out of its group, the rest of it in memory, waiting for its next place.

Rules: it goes on by its agent's word alone (an Assignment of a newer generation) and ends with its agent; what it keeps
is what a new process would have to build or load again. Whether a state survives is not decided here: the next
generation restores from snapshots and checkpoints as a new process would.
"""

import contextlib
import os
import time
from dataclasses import dataclass, replace

from qlora_api.run import ExitCode
from qlora_trainer.control import WorkerEnv, read_assignment, read_control
from qlora_trainer.errors import Fenced, MembersChange, classify
from qlora_trainer.model import TrainableModel
from qlora_trainer.snapshot import SnapshotSlots

_POLL_SECONDS = 0.02


@dataclass
class Kept:
    """What goes with a worker from one generation into the next."""

    model: TrainableModel | None = None
    snapshots: SnapshotSlots | None = None

    def settle(self) -> None:
        """Wait until no thread changes what is kept; a snapshot that fails now is simply not the newest."""
        if self.snapshots is not None:
            with contextlib.suppress(Exception):
                self.snapshots.wait()


def may_stand(error: BaseException, env: WorkerEnv) -> bool:
    """Whether this error is of others: they want a change, or have gone and the agent gives out new places."""
    if isinstance(error, MembersChange):
        return True
    return classify(error).exit_code == ExitCode.LOST_PEER and read_control(env.run_dir).assigns


def next_place(env: WorkerEnv) -> WorkerEnv:
    """Wait for this worker's place in a newer generation. Raises Fenced when its agent is gone."""
    parent = os.getppid()
    while os.getppid() == parent:
        place = read_assignment(env.run_dir, env.local_rank)
        if place is not None and place.generation > env.generation:
            names = {"MASTER_ADDR": place.master_addr, "MASTER_PORT": str(place.master_port)}
            os.environ.update(names, RANK=str(place.rank), WORLD_SIZE=str(place.world_size))
            return replace(env, rank=place.rank, world_size=place.world_size, generation=place.generation)
        time.sleep(_POLL_SECONDS)
    raise Fenced("the agent is gone while this worker was parked")
