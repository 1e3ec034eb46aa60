"""The end of a run: rank 0 writes, verifies and uploads the adapter, the manifest last; all ranks learn of it.

Rules: a run is published once; a worker of an older generation uploads below its own key and writes no manifest.
While rank 0 merges, which may take long, all ranks meet after every file: no collective waits for the whole of it, a
lost rank 0 is found as in training, and everybody shows signs of life.
"""

import sys
import tempfile
from pathlib import Path

from qlora_api.layout import merged_key
from qlora_api.run import TrainConfig
from qlora_api.status import Artifacts
from qlora_trainer import adapter, faults
from qlora_trainer.background import answer_of, in_daemon
from qlora_trainer.control import WorkerEnv, read_control
from qlora_trainer.errors import Fenced, StorageError
from qlora_trainer.group import broadcast
from qlora_trainer.merge import merge_to_store
from qlora_trainer.progress import Reporter
from qlora_trainer.restore import Position, patience_of
from qlora_trainer.session import Session
from qlora_trainer.snapshot import newest_header
from qlora_trainer.standing import Kept


def find_published(config: TrainConfig, env: WorkerEnv, kept: Kept) -> Artifacts | None:
    """What this run has published already; all ranks learn of it.

    A bucket that does not answer says nothing while training can go on: what is published stays, twice is refused.
    """
    found = _ask_bucket(config, env, kept) if env.rank == 0 else None
    result: Artifacts | None = broadcast(found, 0, env)
    return result


def _ask_bucket(config: TrainConfig, env: WorkerEnv, kept: Kept) -> Artifacts | None:
    newest = newest_header(env.run_dir)
    patience = patience_of(newest.generation if newest else -1, env)
    try:
        store = kept.open(config, env)[0]
        return answer_of(in_daemon(adapter.find_published, store), patience)
    except StorageError as error:
        if patience is None:
            raise
        print(f"not known whether the adapter is published: {error}", file=sys.stderr)
        return None


def publish(session: Session, position: Position, reporter: Reporter) -> Artifacts:
    """Rank 0 writes, verifies and uploads the adapter; all ranks learn of it."""
    reporter.publishing()
    try:
        session.checkpoints.finish()
    except StorageError as error:
        reporter.saved(session, error)  # the adapter comes next: it decides
    published = _write_and_upload(session, position, reporter) if session.is_first else None
    while (found := _meet(session, reporter, published)) is None:
        pass
    return found


def _meet(session: Session, reporter: Reporter, published: Artifacts | None) -> Artifacts | None:
    """All ranks: rank 0 goes on, or has published."""
    found: Artifacts | None = broadcast(published, 0, session.env)
    reporter.alive()
    return found


def _chosen_evaluation(session: Session, position: Position) -> tuple[int, float | None]:
    """(step, loss) of the adapter to publish, which is put in place: the best under early stopping, else the last."""
    best = position.history.best_evaluation
    if session.config.spec.training.early_stopping_patience is None or best is None:
        return position.step, position.history.eval_loss
    if session.snapshots:
        session.snapshots.wait()
    session.optimizer.load_best()
    return best


def _write_and_upload(session: Session, position: Position, reporter: Reporter) -> Artifacts:
    config, model = session.config, session.model

    def fence() -> None:
        if read_control(session.env.run_dir).generation > session.env.generation:
            raise Fenced("a newer generation exists: it publishes the adapter")

    published = _chosen_evaluation(session, position)
    metrics = adapter.metrics_of(position.history, position.step, published, reporter.measured())
    provenance = adapter.provenance_of(config, session.data.digests)
    with tempfile.TemporaryDirectory(prefix="adapter-") as name:
        folder = Path(name)
        tensors = {**model.trainable, **model.frozen}
        adapter.write_adapter(config, tensors, model.hf_config, folder)
        adapter.write_report(config, position.history, metrics, provenance, folder)
        faults.reach("upload", position.step)
        if config.spec.output.merge:
            key = merged_key(session.env.generation)
            for _ in merge_to_store(model.packed, folder, session.model_dir, session.store, key, session.device):
                fence()
                _meet(session, reporter, None)
        return adapter.publish(
            session.store, session.layout, folder, session.env.generation, metrics, provenance, fence
        )
