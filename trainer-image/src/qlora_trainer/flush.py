"""The newest snapshot of this pod, made durable without its peers: what a pod does before it goes.

Rules: nothing is written when the bucket already holds that step; the checkpoint is an ordinary one, under the
generation of the snapshot. Several pods may do so for one step: they write the same bytes.
"""

from qlora_api.run import ExitCode, TrainConfig
from qlora_trainer.checkpoint import CheckpointWriter, find_newest
from qlora_trainer.control import WorkerEnv
from qlora_trainer.output import open_output
from qlora_trainer.snapshot import SnapshotSlots
from qlora_trainer.train import config_path, guarded


def run() -> ExitCode:
    """In a process of its own, forked from the warm server."""
    return guarded(flush_snapshot, config_path(), WorkerEnv.of_environment())


def flush_snapshot(config: TrainConfig, env: WorkerEnv) -> int | None:
    """Step of the checkpoint that was written, or None when there was nothing new. Raises StorageError."""
    snapshot = SnapshotSlots(env.run_dir).newest()
    if snapshot is None or snapshot.step == 0:
        return None
    store, _ = open_output(config, env)
    durable = find_newest(store)
    if durable is not None and durable.step >= snapshot.step:
        return None
    state, extra = snapshot.view()  # no worker lives that could write on
    writer = CheckpointWriter(store, None, mesh=None)  # who stays reads those that would be pruned now
    writer.save(snapshot.step, snapshot.generation, state, extra)
    writer.finish()
    print(f"checkpoint of step {snapshot.step} written from the snapshot", flush=True)
    return snapshot.step
