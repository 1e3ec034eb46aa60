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
# Texts by which CUDA tells that the GPU or its links broke down, whoever asked it.
_FAULTY_NODE_TEXTS = ("uncorrectable ecc", "uncorrectable nvlink", "fallen off the bus", "gpu is lost")
_NODE_HINT = "cordon the node and have its GPUs examined (Xid lines of the kernel log); the pod is started elsewhere"
# What NCCL fails at alone, and where to look. Its error codes do not tell: a peer that is gone ends as a remote, system
# or internal error, so that only the texts below, of its "Last error", are certainly this rank's own.
_INTERFACE_HINT = "no network interface of this pod is what NCCL_SOCKET_IFNAME in podTemplate asks for: correct it"
_SHM_HINT = "/dev/shm is too small for NCCL: raise resourcesPerNode.limits.memory, or the volume's limit in podTemplate"
_OWN_NCCL_TEXTS = {
    "no socket interface found": _INTERFACE_HINT,
    "no usable listening interface found": _INTERFACE_HINT,
    "no interface found": _INTERFACE_HINT,
    "creating shared memory segment": _SHM_HINT,  # attaching to one fails when its maker is gone
    "failed to extend /dev/shm": _SHM_HINT,
    "unhandled cuda error": "a CUDA call of NCCL's failed here: set NCCL_DEBUG=INFO in podTemplate for its own words,"
    " and look at the node's driver, Fabric Manager and kernel log",
}
_PEER_MEMORY = "peer gpu memory"  # in CUDA's error for memory that may be gone with its owner
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
    if isinstance(error, RuntimeError) and (own := _own_fault(text.lower())):
        code, reason, hint = own
        return code, reason or type(error).__name__, f"{text[: MAX_TEXT // 2].rstrip()}: {hint}"
    if names & {"DistBackendError", "DistNetworkError", "DistStoreError"}:
        return ExitCode.LOST_PEER, Reason.LOST_PEER, text
    if isinstance(error, RuntimeError) and any(part in text.lower() for part in _LOST_PEER_TEXTS):
        return ExitCode.LOST_PEER, Reason.LOST_PEER, text
    return ExitCode.INTERNAL, type(error).__name__, text


def _own_fault(text: str) -> tuple[ExitCode, str, str] | None:
    """(exit code, reason or "", hint) when CUDA or NCCL tell of this node or this rank, not of a peer."""
    if any(part in text for part in _FAULTY_NODE_TEXTS):
        return ExitCode.FAULTY_NODE, Reason.FAULTY_NODE, _NODE_HINT
    if "cuda" in text and "out of memory" in text:
        return ExitCode.OUT_OF_MEMORY, Reason.OUT_OF_MEMORY, _MEMORY_HINT
    hint = next((hint for part, hint in _OWN_NCCL_TEXTS.items() if part in text), None)
    return (ExitCode.INTERNAL, "", hint) if hint and _PEER_MEMORY not in text else None
