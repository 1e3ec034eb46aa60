"""A worker's environment below tmp_path and small configurations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_api.run import RunIdentity, TrainConfig
from qlora_api.types import QLoRAFinetuneSpec
from qlora_trainer.control import WorkerEnv


@pytest.fixture
def env(tmp_path: Path) -> WorkerEnv:
    return WorkerEnv(
        rank=0,
        local_rank=0,
        world_size=1,
        generation=3,
        run_dir=tmp_path / "run",
        cache_dir=tmp_path / "cache",
        secrets_dir=tmp_path / "secrets",
        device_type="cpu",
    )


@pytest.fixture
def make_config() -> Callable[..., TrainConfig]:
    """Sections of the spec in camelCase -> configuration."""

    def make(**sections: dict[str, Any]) -> TrainConfig:
        spec: dict[str, dict[str, Any]] = {
            "model": {"uri": "file:///model"},
            "dataset": {"uri": "file:///data"},
            "output": {"uri": "s3://bucket/runs"},
        }
        for name, values in sections.items():
            spec[name] = {**spec.get(name, {}), **values}
        run = RunIdentity(namespace="default", name="run", uid="0123456789")
        return TrainConfig(run=run, spec=QLoRAFinetuneSpec.model_validate(spec))

    return make
