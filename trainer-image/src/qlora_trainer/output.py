"""Where a run writes."""

from qlora_api.layout import RunLayout
from qlora_api.run import TrainConfig
from qlora_trainer.control import WorkerEnv
from qlora_trainer.storage import ObjectStore, open_store


def open_output(config: TrainConfig, env: WorkerEnv) -> tuple[ObjectStore, RunLayout]:
    """The store below the run's root, and its layout. Raises StorageError."""
    output = config.spec.output
    layout = RunLayout.of(output.uri, config.run)
    return open_store(layout.root, output, env.secrets_dir / "output"), layout
