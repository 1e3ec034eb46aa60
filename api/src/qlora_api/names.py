"""Names that more than one part uses: the resource, labels, object names, condition types and reasons."""

from enum import StrEnum

GROUP = "qlora.dev"
VERSION = "v1alpha1"
KIND = "QLoRAFinetune"
PLURAL = "qlorafinetunes"
SINGULAR = "qlorafinetune"
SHORT = "qft"
FIELD_MANAGER = "qlora-operator"

LABEL_RUN = f"{GROUP}/run"
LABEL_INDEX = f"{GROUP}/index"
LABEL_INCARNATION = f"{GROUP}/incarnation"
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
CONTAINER = "trainer"
MAX_NAME = 48  # room for -INDEX-INCARNATION within a label's 63 characters


def pod_name(run: str, index: int, incarnation: int) -> str:
    """Name of the pod of place `index`."""
    return f"{run}-{index}-{incarnation}"


def place_of(pod: str) -> str:
    """What the pods of one place have in common: their name without the incarnation."""
    return pod.rpartition("-")[0]


def config_name(run: str) -> str:
    """Name of the run's ConfigMap and ServiceAccount."""
    return f"{run}-qlora"


class ConditionType(StrEnum):
    """Condition types; adjectives, abnormal ones are absent until they happen."""

    RUNNING = "Running"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"


class Reason(StrEnum):
    """Reasons of conditions, events and terminations."""

    # on the way
    PODS_PENDING = "PodsPending"
    UNSCHEDULABLE = "Unschedulable"
    QUOTA_EXCEEDED = "QuotaExceeded"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    MISSING_SECRET = "MissingSecret"
    MOUNT_FAILED = "MountFailed"
    WARMING_UP = "WarmingUp"
    TRAINING = "Training"
    TOO_FEW_NODES = "TooFewNodes"
    SUSPENDING = "Suspending"
    SUSPENDED = "Suspended"
    RESUMED = "Resumed"
    MEMBERS_CHANGED = "MembersChanged"
    NODE_AVOIDED = "NodeAvoided"
    NODE_FORGIVEN = "NodeForgiven"
    FEW_STEPS = "FewSteps"
    STRAGGLER = "Straggler"
    STRAGGLER_RECOVERED = "StragglerRecovered"
    # disruptions: free
    NODE_LOST = "NodeLost"
    POD_LOST = "PodLost"
    SILENT = "Silent"
    EVICTED = "Evicted"
    LOST_PEER = "LostPeer"
    UNFIT_NODE = "UnfitNode"
    # failures: count
    WORKER_FAILED = "WorkerFailed"
    OUT_OF_MEMORY = "OutOfMemory"
    HUNG = "Hung"
    STORAGE_UNAVAILABLE = "StorageUnavailable"
    CORRUPT_BASE = "CorruptBase"
    FAULTY_NODE = "FaultyNode"
    # ends
    ADAPTER_UPLOADED = "AdapterUploaded"
    INVALID_SPEC = "InvalidSpec"
    INVALID_DATASET = "InvalidDataset"
    INVALID_MODEL = "InvalidModel"
    INVALID_ADAPTER = "InvalidAdapter"
    FAILURE_LIMIT_REACHED = "FailureLimitReached"
    REPEATED_STEP_FAILURE = "RepeatedStepFailure"
    ACTIVE_DEADLINE_EXCEEDED = "ActiveDeadlineExceeded"
    START_DEADLINE_EXCEEDED = "StartDeadlineExceeded"
