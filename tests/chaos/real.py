"""The real worker in a file:// bucket (CHAOS_OUTPUT): the API takes s3:// only, the trainer's storage both.

While the file CHAOS_SLOW exists every step takes at least STEP_SECONDS, so that a fault finds the run at work.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_api.run import ExitCode, TrainConfig
from qlora_trainer import flush as flushing
from qlora_trainer import train
from qlora_trainer.control import WorkerEnv
from qlora_trainer.session import make_ready

STEP_SECONDS = 0.15


def _config() -> TrainConfig:
    config = train.read_config(train.config_path())
    output = config.spec.output.model_copy(update={"uri": os.environ["CHAOS_OUTPUT"]})
    return config.model_copy(update={"spec": config.spec.model_copy(update={"output": output})})


def _slowly(step: Callable[..., Any]) -> Callable[..., Any]:
    slow = Path(os.environ.get("CHAOS_SLOW", "/nonexistent"))

    def slowed(*args: Any) -> Any:
        started = time.monotonic()
        result = step(*args)
        if slow.exists():
            time.sleep(max(0.0, started + STEP_SECONDS - time.monotonic()))
        return result

    return slowed


def run() -> ExitCode:
    """A worker of the run."""
    vars(train)["_step"] = _slowly(train._step)
    return train.guarded(train.run_worker, _config(), WorkerEnv.of_environment())


def flush() -> ExitCode:
    """What a pod does before it goes."""
    return train.guarded(flushing.flush_snapshot, _config(), WorkerEnv.of_environment())


def warm() -> ExitCode:
    """What a node needs before its pod is let in."""
    return train.guarded(make_ready, _config(), WorkerEnv.of_environment())
