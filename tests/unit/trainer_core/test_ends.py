"""Why a worker ends, and the files that tell it."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora_api.names import Reason
from qlora_api.run import NEVER_RETRIED, Command, ExitCode
from qlora_trainer import control, errors, train
from qlora_trainer.checkpoint import CheckpointWriter
from qlora_trainer.control import Assignment, Control, Phase, WorkerEnv, WorkerState
from qlora_trainer.standing import next_place
from qlora_trainer.storage import FileStore
from qlora_trainer.train import guarded


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (errors.BadData("a.jsonl:3: not JSON"), ExitCode.BAD_DATA, Reason.INVALID_DATASET),
        (errors.StorageError("bucket b at http://s3"), ExitCode.STORAGE, Reason.STORAGE_UNAVAILABLE),
        (OutOfMemoryError("CUDA out of memory"), ExitCode.OUT_OF_MEMORY, Reason.OUT_OF_MEMORY),
        (MemoryError(), ExitCode.OUT_OF_MEMORY, Reason.OUT_OF_MEMORY),
        (RuntimeError("Connection closed by peer [10.0.0.2]:4711"), ExitCode.LOST_PEER, Reason.LOST_PEER),
        (RuntimeError("shapes do not fit"), ExitCode.INTERNAL, "RuntimeError"),
        (KeyError("x"), ExitCode.INTERNAL, "KeyError"),
    ],
)
def test_errors_have_exit_codes(error: Exception, code: ExitCode, reason: str) -> None:
    termination = errors.classify(error, rank=1, step=7)
    assert (termination.exit_code, termination.reason) == (code, reason)
    assert termination.message and (termination.rank, termination.step) == (1, 7)


def nccl(what: str, last: str) -> torch.distributed.DistBackendError:
    """As torch tells of NCCL's errors."""
    text = f"NCCL error in: ProcessGroupNCCL.cpp:1, {what} (run with NCCL_DEBUG=INFO for details)\nLast error:\n{last}"
    return torch.distributed.DistBackendError(text)


ECC = "uncorrectable ECC error encountered"
SYSTEM, CUDA, REMOTE = (
    "unhandled system error",
    "unhandled cuda error",
    "remote process exited or there was a network error",
)


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (nccl("invalid usage", "Bootstrap : no socket interface found"), ExitCode.INTERNAL, "NCCL_SOCKET_IFNAME"),
        (
            nccl(SYSTEM, "Error while creating shared memory segment /dev/shm/nccl-a"),
            ExitCode.INTERNAL,
            "limits.memory",
        ),
        (nccl(CUDA, "Cuda failure 401 'not in the present state'"), ExitCode.INTERNAL, "Fabric Manager"),
        (nccl(CUDA, "Cuda failure 2 'out of memory'"), ExitCode.OUT_OF_MEMORY, "microBatchSize"),
        (nccl(CUDA, f"Cuda failure 214 '{ECC}'"), ExitCode.FAULTY_NODE, "cordon"),
        (torch.AcceleratorError(f"CUDA error: {ECC}"), ExitCode.FAULTY_NODE, "cordon"),
        (RuntimeError("Unable to determine the device handle: GPU is lost"), ExitCode.FAULTY_NODE, "cordon"),
        (nccl(REMOTE, "socketProgress: Connection closed by remote peer"), ExitCode.LOST_PEER, "remote"),
        (nccl(SYSTEM, "connect to 10.0.0.2 returned Connection refused"), ExitCode.LOST_PEER, "refused"),
        (nccl(SYSTEM, "Error while attaching to shared memory segment /dev/shm/nccl-a"), ExitCode.LOST_PEER, "attach"),
        (nccl(CUDA, "Invalid access of peer GPU memory over nvlink or a hardware error"), ExitCode.LOST_PEER, "peer"),
        (nccl("internal error", "Call to recv failed : Broken pipe"), ExitCode.LOST_PEER, "recv"),
        (torch.distributed.DistStoreError("wait timeout after 5000ms"), ExitCode.LOST_PEER, "timeout"),
    ],
    ids=lambda value: str(value).splitlines()[-1][:60] if isinstance(value, Exception) else None,
)
def test_own_faults_are_told_from_lost_peers(error: Exception, code: ExitCode, says: str) -> None:
    termination = errors.classify(error)
    assert termination.exit_code == code and says in termination.message
    assert termination.reason


def test_every_error_class_has_a_code_of_its_own() -> None:
    classes = errors.TrainerError.__subclasses__()
    assert len({cls.exit_code for cls in classes}) == len(classes)
    assert {cls.exit_code for cls in classes} >= NEVER_RETRIED
    assert all(cls.exit_code != ExitCode.INTERNAL for cls in classes)


def test_guarded_leaves_a_termination(env: WorkerEnv, make_config: Any, tmp_path: Path) -> None:
    control.write_worker_state(env.run_dir, 0, WorkerState.model_validate({"progress": {"step": 5}}))

    def job(config: Any, env: WorkerEnv) -> None:
        raise errors.BadAdapter("x" * 10_000)

    assert guarded(job, make_config(), env) == ExitCode.BAD_ADAPTER
    termination = control.read_termination(env.run_dir, 0)
    assert termination is not None and termination.step == 5 and len(termination.message) <= errors.MAX_TEXT
    assert guarded(job, tmp_path / "no-config.json", env) == ExitCode.BAD_CONFIG


def test_a_worker_that_stood_tells_the_rank_that_it_took(
    env: WorkerEnv, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # as of the rehearsal
    place = Assignment(generation=4, rank=2, world_size=3, master_addr="10.0.0.1", master_port=4711)
    control.write_assignment(env.run_dir, 0, place)

    def job(config: Any, env: WorkerEnv) -> None:
        assert next_place(env).rank == 2
        raise errors.CorruptBase("layer 3")

    assert guarded(job, make_config(), env) == ExitCode.CORRUPT_BASE
    termination = control.read_termination(env.run_dir, 0)
    assert termination is not None and termination.rank == 2


def test_a_stop_at_the_step_of_a_save_under_way_saves_it_once(env: WorkerEnv, tmp_path: Path) -> None:
    uploads: list[str] = []

    class Slow(FileStore):
        def put(self, key: str, data: bytes | Path, if_none_match: bool = False) -> bool:
            time.sleep(0.1)
            uploads.append(key)
            return super().put(key, data, if_none_match)

    def stop_at(step: int) -> None:
        told = SimpleNamespace(stopped=lambda *_: None, saved=lambda *_: None, alive=lambda: None)
        told.save_started = lambda *_: None
        position = SimpleNamespace(step=step, to_extra=lambda session: {"step": step})
        session = SimpleNamespace(env=env, checkpoints=checkpoints, snapshots=None, optimizer=optimizer)
        with pytest.raises(errors.Stopped):
            train._park(session, position, told, stop=True)  # type: ignore[arg-type]

    checkpoints = CheckpointWriter(Slow(tmp_path), keep=2, mesh=None)
    optimizer = SimpleNamespace(state=lambda: {"adapter.master": torch.ones(8)})
    checkpoints.save(4, env.generation, optimizer.state(), {"step": 4})
    stop_at(4)
    assert checkpoints.newest is not None and checkpoints.newest.step == 4 and len(uploads) == 2
    stop_at(5)
    assert checkpoints.newest.step == 5 and len(uploads) == 4


def test_files_between_agent_and_worker(env: WorkerEnv) -> None:
    assert control.read_control(env.run_dir) == Control()
    assert control.read_worker_state(env.run_dir, 0) is None
    wish = Control(generation=3, prepare=4, command=Command.STOP)
    control.write_control(env.run_dir, wish)
    state = WorkerState(generation=3, phase=Phase.PARKED, metrics={"step_seconds": 1.5})
    control.write_worker_state(env.run_dir, 1, state)
    assert control.read_control(env.run_dir) == wish
    assert control.read_worker_state(env.run_dir, 1) == state
    control.clear_worker_files(env.run_dir)
    assert control.read_worker_state(env.run_dir, 1) is None and control.read_control(env.run_dir) == wish


def test_environment_of_torch_elastic() -> None:
    env = WorkerEnv.of_environment({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "QLORA_GENERATION": "9"})
    assert (env.rank, env.local_rank, env.world_size, env.generation) == (3, 1, 4, 9)
    assert env.run_dir == Path("/run/qlora") and env.init_method == "env://"
