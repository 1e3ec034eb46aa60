"""Where training goes on: the newest state among the members' snapshots and the bucket's checkpoints.

Rules: the newest step wins, a snapshot before a checkpoint of the same step; all ranks take the state from one source,
so they start bit-equal; a damaged checkpoint is passed over, an unreachable bucket stops nothing while there are
snapshots, and nobody waits for a slow one while a member has a snapshot of the generation before. A model or data set
that changed under a run is refused.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qlora_trainer import checkpoint
from qlora_trainer.background import answer_of, in_daemon
from qlora_trainer.checkpoint import CheckpointWriter
from qlora_trainer.control import WorkerEnv
from qlora_trainer.errors import BadConfig, StorageError
from qlora_trainer.group import all_gather, broadcast
from qlora_trainer.report import History
from qlora_trainer.session import Session
from qlora_trainer.storage import ObjectStore

State = tuple[Mapping[str, Tensor], dict[str, Any]]
PATIENCE_SECONDS = 1.0  # with the bucket, when it is not needed


@dataclass
class Position:
    """How far the run is: optimizer steps done, and what happened on the way."""

    step: int = 0
    history: History = field(default_factory=History)

    def to_extra(self, session: Session) -> dict[str, Any]:
        """What travels with the state."""
        return {"step": self.step, "history": self.history.to_json(), "digests": session.data.digests}


@dataclass(frozen=True)
class Offer:
    """The newest state that a rank has. Offers compare by step, then generation."""

    step: int = -1
    generation: int = -1


def patience_of(generation: int, env: WorkerEnv) -> float | None:
    """Seconds to wait for the bucket at the start of env's generation; None: until it answers.

    Every generation begins with a snapshot: one of the generation before is the newest state but for a step.
    """
    return PATIENCE_SECONDS if generation >= 0 and generation == env.generation - 1 else None


def restore(session: Session) -> Position:
    """Put the newest state into the optimizer of every rank; where it stands."""
    env = session.env
    snapshot = session.snapshots.newest() if session.snapshots else None
    mine = Offer(snapshot.step, snapshot.generation) if snapshot else Offer()
    offers = all_gather((mine, session.data.digests), env)
    if any(digests != session.data.digests for _, digests in offers):
        raise BadConfig("the members read different models or data sets: leave the sources alone during a run")
    best, source = max(((o.step, o.generation), -rank) for rank, (o, _) in enumerate(offers))
    loaded = _from_bucket(session, Offer(*best)) if session.is_first else None
    from_bucket = broadcast(loaded is not None, 0, env)
    if not from_bucket and best[0] < 0:
        return Position()
    source = 0 if from_bucket else -source
    if source == env.rank and not from_bucket:
        assert snapshot is not None
        loaded = snapshot.view()  # copied before the next snapshot is written
    extra = broadcast(loaded[1] if loaded and source == env.rank else None, source, env)
    _require_same_sources(session, extra)
    if source == env.rank:
        assert loaded is not None
        session.optimizer.load_state(loaded[0], extra["step"])
    _share(session, source, extra["step"])
    return Position(extra["step"], History.of_json(extra["history"]))


def _from_bucket(session: Session, best: Offer) -> State | None:
    """Rank 0: the newest intact checkpoint beyond the best snapshot, or None."""
    looking = in_daemon(_look, session.store, session.checkpoints, best.step)
    try:
        return answer_of(looking, patience_of(best.generation, session.env))
    except StorageError as error:
        if best.step < 0:
            raise
        print(f"going on from the snapshot of step {best.step}: {error}", file=sys.stderr, flush=True)
    return None


def _look(store: ObjectStore, checkpoints: CheckpointWriter, newer_than: int) -> State | None:
    """In the thread: also what `checkpoints` wants to know of the bucket, sooner or later."""
    for manifest in checkpoint.find_complete(store):
        if manifest.step <= newer_than:
            checkpoints.found = checkpoints.status_of(manifest)
            return None
        try:
            state = checkpoint.load(store, manifest)
            checkpoints.found = checkpoints.status_of(manifest)
            return state, dict(manifest.extra)
        except (StorageError, FileNotFoundError) as error:
            print(f"checkpoint of step {manifest.step} passed over: {error}", file=sys.stderr, flush=True)
    return None


def _require_same_sources(session: Session, extra: dict[str, Any]) -> None:
    changed = [name for name, digest in session.data.digests.items() if extra["digests"].get(name) != digest]
    if changed:
        raise BadConfig(
            f"{' and '.join(changed)} changed since step {extra['step']}: restore the source's content or create a new"
            " QLoRAFinetune"
        )


def _share(session: Session, source: int, num_updates: int) -> None:
    """Broadcast the live state tensors from `source`."""
    live = session.optimizer.state()
    if session.env.world_size > 1:
        for tensor in live.values():
            dist.broadcast(tensor, src=source)
        if session.device.type == "cuda":
            torch.cuda.synchronize(session.device)
        session.group.require_whole()  # before anything can take it for a state of this generation
    session.optimizer.load_state(live, num_updates)
