"""The real worker in a file:// bucket (CHAOS_OUTPUT): the API takes s3:// only, the trainer's storage both."""

import os

from qlora_api.run import ExitCode, TrainConfig
from qlora_trainer import train
from qlora_trainer.control import WorkerEnv
from qlora_trainer.session import prepare


def _config() -> TrainConfig:
    config = train.read_config(train.config_path())
    output = config.spec.output.model_copy(update={"uri": os.environ["CHAOS_OUTPUT"]})
    return config.model_copy(update={"spec": config.spec.model_copy(update={"output": output})})


def run() -> ExitCode:
    """A worker of the run."""
    return train.guarded(train.run_worker, _config(), WorkerEnv.of_environment())


def warm() -> None:
    """What a node needs before its pod is let in."""
    train.end_process(train.guarded(prepare, _config(), WorkerEnv.of_environment()))
