"""The files between agent and worker (RUN_DIR), typed. docs/architecture.md lists who writes which.

Rules: every file is replaced atomically (write, rename), so a reader sees the old or the new content, never a part; a
file that isn't there yet reads as None. No torch here: the agent reads these files without it.
"""

import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from pydantic import Field

from qlora_api.base import ApiModel
from qlora_api.memory import Plan
from qlora_api.run import CACHE_DIR, RUN_DIR, SECRETS_DIR, Command, Termination
from qlora_api.status import Artifacts, CheckpointStatus, Progress

ENV_GENERATION = "QLORA_GENERATION"
ENV_RUN_DIR = "QLORA_RUN_DIR"
ENV_CACHE_DIR = "QLORA_CACHE_DIR"
ENV_SECRETS_DIR = "QLORA_SECRETS_DIR"
ENV_DEVICE = "QLORA_DEVICE"
ENV_TRACE = "QLORA_TRACE"


@dataclass(frozen=True)
class WorkerEnv:
    """What a worker process knows beside the run's configuration."""

    rank: int
    local_rank: int
    world_size: int
    generation: int
    run_dir: Path
    cache_dir: Path
    secrets_dir: Path
    device_type: str  # "cuda" or "cpu"
    init_method: str = "env://"  # of the process group; torch elastic's variables by default
    trace: bool = False  # write trace-RANK.jsonl: the samples of every step

    @classmethod
    def of_environment(cls, environ: dict[str, str] | None = None) -> "WorkerEnv":
        """From torch elastic's variables (RANK, LOCAL_RANK, WORLD_SIZE) and QLORA_*."""
        env = dict(os.environ) if environ is None else environ
        return cls(
            rank=int(env.get("RANK", "0")),
            local_rank=int(env.get("LOCAL_RANK", "0")),
            world_size=int(env.get("WORLD_SIZE", "1")),
            generation=int(env.get(ENV_GENERATION, "0")),
            run_dir=Path(env.get(ENV_RUN_DIR, RUN_DIR)),
            cache_dir=Path(env.get(ENV_CACHE_DIR, CACHE_DIR)),
            secrets_dir=Path(env.get(ENV_SECRETS_DIR, SECRETS_DIR)),
            device_type=env.get(ENV_DEVICE) or ("cuda" if has_gpu() else "cpu"),
            trace=env.get(ENV_TRACE, "") not in ("", "0"),
        )


def has_gpu() -> bool:
    """Whether this container has an NVIDIA GPU; asks neither driver nor torch."""
    return Path("/dev/nvidiactl").exists()


class Control(ApiModel):
    """`control.json`, written by the agent: `Membership` without its members, and what workers may do."""

    generation: int = 0
    prepare: int = Field(0, description="Above generation while a change of members is being prepared.")
    abandon: bool = Field(False, description="This generation's collectives will not end: leave without the others.")
    assigns: bool = Field(False, description="Workers that stand are given places in the next generation.")
    metrics: dict[str, float] = Field(default_factory=dict, description="The agent's measures, for the run's report.")
    command: Command = Command.RUN


class Assignment(ApiModel):
    """`assignment-LOCALRANK.json`, written by the agent: a parked worker's place in the next generation."""

    generation: int
    rank: int
    world_size: int
    master_addr: str
    master_port: int


class Phase(StrEnum):
    """Where a worker is in its life."""

    STARTING = "starting"  # process group, model, restore
    TRAINING = "training"
    PARKED = "parked"  # at a step boundary, out of its group or about to stop: takes another place or ends
    FINISHED = "finished"  # manifest is in the bucket


class WorkerState(ApiModel):
    """`worker-LOCALRANK.json`, written by the worker after every step."""

    generation: int = 0
    phase: Phase = Phase.STARTING
    pid: int = 0
    progress: Progress = Progress()
    activity: int = 0  # rises whenever something was done: a step, a micro batch, a while of waiting for an upload
    snapshot_step: int | None = None
    checkpoint: CheckpointStatus | None = None
    artifacts: Artifacts | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    plan: Plan | None = None


Model = TypeVar("Model", bound=ApiModel)


def write_atomically(path: Path, text: str) -> None:
    """Replace the file's content in one go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def _write(path: Path, value: ApiModel) -> None:
    write_atomically(path, value.model_dump_json(by_alias=True, exclude_none=True))


def _read(path: Path, kind: type[Model]) -> Model | None:
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None


def write_control(run_dir: Path, control: Control) -> None:
    """Agent: tell the workers of this pod."""
    _write(run_dir / "control.json", control)


def read_control(run_dir: Path) -> Control:
    """Worker: what the agent wants; all defaults when it has said nothing."""
    return _read(run_dir / "control.json", Control) or Control()


def write_assignment(run_dir: Path, local_rank: int, assignment: Assignment) -> None:
    """Agent: a parked worker goes on."""
    _write(run_dir / f"assignment-{local_rank}.json", assignment)


def read_assignment(run_dir: Path, local_rank: int) -> Assignment | None:
    """Worker: where it goes on."""
    return _read(run_dir / f"assignment-{local_rank}.json", Assignment)


def write_worker_state(run_dir: Path, local_rank: int, state: WorkerState) -> None:
    """Worker: how far it is."""
    _write(run_dir / f"worker-{local_rank}.json", state)


def read_worker_state(run_dir: Path, local_rank: int) -> WorkerState | None:
    """Agent: how far a worker is."""
    return _read(run_dir / f"worker-{local_rank}.json", WorkerState)


def write_termination(run_dir: Path, local_rank: int, termination: Termination) -> None:
    """Worker: why it ends."""
    _write(run_dir / f"termination-{local_rank}.json", termination)


def read_termination(run_dir: Path, local_rank: int) -> Termination | None:
    """Agent: why a worker ended."""
    return _read(run_dir / f"termination-{local_rank}.json", Termination)


def clear_worker_files(run_dir: Path) -> None:
    """Agent: before the workers of a new generation start."""
    for pattern in ("worker-*.json", "termination-*.json", "assignment-*.json"):
        for path in run_dir.glob(pattern):
            path.unlink(missing_ok=True)
