"""The contract between operator and trainer pods: what a pod is told, what it reports, and why it ends.

The protocol: an agent (PID 1 of a trainer pod) posts a `Report` to the coordinator and gets a `Membership` back. The
call is held open until something newer than the known_* fields is there or `wait_seconds` are over: heartbeat, progress
and membership in one. A change of members has two phases. First `prepare` rises above `generation`: agents bring their
workers to a step boundary (or kill them when peers are gone), stand in the rendezvous and report READY. Once every live
agent stands there, `generation` rises to `prepare` with the new members. Generations never fall; every durable write
carries the generation it was made under.
"""

from enum import IntEnum, StrEnum

from pydantic import Field

from qlora_api.base import ApiModel
from qlora_api.memory import Plan
from qlora_api.status import Artifacts, CheckpointStatus, Member, Progress
from qlora_api.types import QLoRAFinetuneSpec


class RunIdentity(ApiModel):
    """Which run a pod belongs to."""

    namespace: str
    name: str
    uid: str


class TrainConfig(ApiModel):
    """Mounted into every pod as CONFIG_PATH; all that the trainer needs to know beside its environment."""

    run: RunIdentity
    spec: QLoRAFinetuneSpec


class AgentState(StrEnum):
    """What a pod's agent does right now."""

    WARMING = "Warming"  # imports, base model into the cache; not yet a candidate
    READY = "Ready"  # stands in the rendezvous
    RUNNING = "Running"  # workers of `generation` run
    LEAVING = "Leaving"  # told to stop (SIGTERM): finishes the step, must not be counted on
    FINISHED = "Finished"  # the run is done and its artifacts are in the bucket
    FAILED = "Failed"  # workers ended with an error; `termination` says why


class ExitCode(IntEnum):
    """Exit codes of a worker and of a pod (sysexits.h where one fits); torchrun would flatten them to 1."""

    OK = 0
    INTERNAL = 70  # a bug or an unknown error: counts, is retried
    BAD_CONFIG = 64  # the spec cannot work: never retried
    BAD_DATA = 65  # data set empty or malformed: never retried
    BAD_MODEL = 66  # model cannot be used: never retried
    STORAGE = 74  # object store unreachable or refusing: counts, is retried
    CORRUPT_BASE = 76  # packed bytes differ from their checksum: counts, is retried elsewhere
    OUT_OF_MEMORY = 77  # GPU or host memory: counts, says which knob to turn
    BAD_ADAPTER = 78  # adapter empty, NaN or unchanged: never retried
    LOST_PEER = 79  # a collective broke: free, follows from another pod's fate
    STOPPED = 80  # told to stop (suspend, SIGTERM): free
    FENCED = 81  # a newer generation exists: free
    FAULTY_NODE = 82  # GPU or links failed the check before training, or later: counts, is retried elsewhere


NEVER_RETRIED = frozenset({ExitCode.BAD_CONFIG, ExitCode.BAD_DATA, ExitCode.BAD_MODEL, ExitCode.BAD_ADAPTER})
NODE_FAULTS = frozenset({ExitCode.CORRUPT_BASE, ExitCode.FAULTY_NODE})  # the pod is replaced, not only its workers
FREE = frozenset({ExitCode.OK, ExitCode.LOST_PEER, ExitCode.STOPPED, ExitCode.FENCED})


class Termination(ApiModel):
    """Why a worker or a pod ended; also the pod's termination message."""

    exit_code: int
    reason: str = Field(description="CamelCase, from names.Reason or the exception's class name.")
    message: str = Field("", max_length=3000, description="What happened and what to do.")
    rank: int | None = None
    step: int = 0
    log_tail: str = Field("", max_length=3000)


class Command(StrEnum):
    """What the operator wants of the pods, apart from membership."""

    RUN = "Run"
    STOP = "Stop"  # stop at a step boundary, write a durable checkpoint, exit with STOPPED


class Report(ApiModel):
    """Agent -> coordinator. The pod's identity is taken from its token, never from here."""

    address: str
    state: AgentState
    generation: int = Field(0, ge=0, description="Newest generation that this agent joined.")
    known_generation: int = Field(0, ge=0, description="Answer when any known_* is stale.")
    known_prepare: int = Field(0, ge=0)
    known_command: Command = Command.RUN
    wait_seconds: float = Field(0, ge=0, le=30)
    progress: Progress | None = None
    activity: int | None = Field(None, ge=0, description="Changes when workers get something done, also between steps.")
    snapshot_step: int | None = Field(None, ge=0, description="Newest step in this pod's memory tier.")
    checkpoint: CheckpointStatus | None = None
    artifacts: Artifacts | None = None
    termination: Termination | None = None
    metrics: dict[str, float] = Field({}, description="Names as in docs/metrics.md; exported to Prometheus.")
    plan: Plan | None = Field(None, description="Memory plan that the workers of `generation` follow.")


class Membership(ApiModel):
    """Coordinator -> agent."""

    generation: int = 0
    members: list[Member] = []
    prepare: int = Field(0, description="Above generation while a change is being prepared.")
    command: Command = Command.RUN


def parse_config(text: str) -> TrainConfig:
    """The mounted configuration; raises pydantic.ValidationError with the field's path."""
    return TrainConfig.model_validate_json(text)


METRIC_STEP_WORK = "step_work_seconds"  # in Report.metrics: by it the operator tells stragglers
CONFIG_PATH = "/etc/qlora/config/config.json"
CA_PATH = "/etc/qlora/config/ca.crt"
TOKEN_PATH = "/var/run/secrets/qlora/token"
SECRETS_DIR = "/etc/qlora/secrets"  # one folder each: model, dataset, output
RUN_DIR = "/run/qlora"  # memory volume: control, progress, snapshots; survives container restarts
CACHE_DIR = "/cache"  # base model and packed cache; shared by the pods of a node where the cluster allows it
PVC_DIR = "/mnt/pvc"  # pvc://CLAIM/path is mounted at PVC_DIR/CLAIM
TERMINATION_PATH = "/dev/termination-log"
TOKEN_AUDIENCE = "qlora.dev/coordinator"
STORE_PORT = 29400  # TCPStore of a generation: STORE_PORT + generation % 100 on the first member
ENV_COORDINATOR = "QLORA_COORDINATOR"  # base URL; the agent posts to SYNC_PATH below it
ENV_POD_NAME = "QLORA_POD_NAME"
ENV_POD_UID = "QLORA_POD_UID"
ENV_POD_IP = "QLORA_POD_IP"
ENV_NODE_NAME = "QLORA_NODE_NAME"
SYNC_PATH = "/v1/namespaces/{namespace}/runs/{name}/sync"
