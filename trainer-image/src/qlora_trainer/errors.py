"""Why a worker ends: every error that a person can act on has an exit code, a reason and a sentence on what to do.

Rules: raise the narrowest class; the message says what happened and what to do next. `classify` turns whatever reaches
the outermost loop into a `Termination`; only it looks at the classes and texts of other libraries' exceptions.
"""

import traceback

from qlora_api.names import Reason
from qlora_api.run import ExitCode, Termination

MAX_TEXT = 3000  # characters, as in Termination


class TrainerError(Exception):
    """An error with a place in the contract."""

    exit_code = ExitCode.INTERNAL
    reason: str = Reason.WORKER_FAILED


class BadConfig(TrainerError, ValueError):
    """The spec cannot work."""

    exit_code = ExitCode.BAD_CONFIG
    reason = Reason.INVALID_SPEC


class BadData(TrainerError, ValueError):
    """The data set is empty or malformed."""

    exit_code = ExitCode.BAD_DATA
    reason = Reason.INVALID_DATASET


class BadModel(TrainerError, ValueError):
    """The base model cannot be used."""

    exit_code = ExitCode.BAD_MODEL
    reason = Reason.INVALID_MODEL


class StorageError(TrainerError, OSError):
    """The object store is unreachable or refuses."""

    exit_code = ExitCode.STORAGE
    reason = Reason.STORAGE_UNAVAILABLE


class CorruptBase(TrainerError):
    """The base model's packed bytes differ from their checksum."""

    exit_code = ExitCode.CORRUPT_BASE
    reason = Reason.CORRUPT_BASE


class FaultyNode(TrainerError):
    """The node computes, remembers or transmits wrongly."""

    exit_code = ExitCode.FAULTY_NODE
    reason = Reason.FAULTY_NODE


class OutOfMemory(TrainerError):
    """GPU or host memory is exhausted."""

    exit_code = ExitCode.OUT_OF_MEMORY
    reason = Reason.OUT_OF_MEMORY


class BadAdapter(TrainerError):
    """What was trained or saved is not an adapter: empty, NaN, unchanged or unlike what was written."""

    exit_code = ExitCode.BAD_ADAPTER
    reason = Reason.INVALID_ADAPTER


class LostPeer(TrainerError):
    """A collective broke because another member is gone."""

    exit_code = ExitCode.LOST_PEER
    reason = Reason.LOST_PEER


class Stopped(TrainerError):
    """Told to stop; state is saved."""

    exit_code = ExitCode.STOPPED
    reason = Reason.SUSPENDING


class Fenced(TrainerError):
    """A newer generation exists: this worker must write nothing more."""

    exit_code = ExitCode.FENCED
    reason = Reason.MEMBERS_CHANGED


class MembersChange(Exception):
    """No error: a new generation is being prepared, and this worker stands at a step boundary. It never ends one."""


# Texts by which gloo, NCCL and TCPStore tell that a peer is gone; they come as plain RuntimeErrors.
_LOST_PEER_TEXTS = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "socket timeout",
    "timed out waiting",
    "nccl communicator was aborted",
    "remote process exited",
    "gloo connectfullmesh failed",
    "connectfullmesh",
    "failed to recv",
    "failed to send",
    "collective was aborted",
    "wait timeout",
)
_MEMORY_HINT = (
    "lower training.microBatchSize or training.maxLength, set training.gradientCheckpointing: full, or shard over more"
    " nodes with training.shardingStrategy: FULL_SHARD"
)


def classify(error: BaseException, rank: int | None = None, step: int = 0) -> Termination:
    """Why this error ends the worker: exit code, reason and message of the contract, with the traceback's tail."""
    code, reason, message = _code_of(error)
    tail = "".join(traceback.format_exception(error))[-MAX_TEXT:]
    return Termination(exit_code=code, reason=reason, message=message[:MAX_TEXT], rank=rank, step=step, log_tail=tail)


def _code_of(error: BaseException) -> tuple[ExitCode, str, str]:
    if isinstance(error, TrainerError):
        return error.exit_code, str(error.reason), str(error)
    names = {cls.__name__ for cls in type(error).__mro__}
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or names & {"OutOfMemoryError"}:
        return ExitCode.OUT_OF_MEMORY, Reason.OUT_OF_MEMORY, f"{text.splitlines()[0]}: {_MEMORY_HINT}"
    if names & {"DistBackendError", "DistNetworkError", "DistStoreError"}:
        return ExitCode.LOST_PEER, Reason.LOST_PEER, text
    if isinstance(error, RuntimeError) and any(part in text.lower() for part in _LOST_PEER_TEXTS):
        return ExitCode.LOST_PEER, Reason.LOST_PEER, text
    return ExitCode.INTERNAL, type(error).__name__, text
