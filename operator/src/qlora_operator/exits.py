"""How something ended: one pod's worker, container or place, in the words of reasons, with advice.

Exit codes are the contract of api/run.py; a container's end comes from the kubelet, a worker's from its agent.
"""

from dataclasses import dataclass

from qlora_api.names import Reason
from qlora_api.run import FREE, ExitCode, Termination
from qlora_operator.state import Pod

_SIGKILL, _SIGTERM = (-9, 137), (-15, 143)
# The kubelet's word for a container that it can't find, containerd's for one whose shim died with the node.
_LOST_WITH_ITS_NODE = ("ContainerStatusUnknown", "Unknown")

FATAL_REASONS = {
    ExitCode.BAD_CONFIG: Reason.INVALID_SPEC,
    ExitCode.BAD_DATA: Reason.INVALID_DATASET,
    ExitCode.BAD_MODEL: Reason.INVALID_MODEL,
    ExitCode.BAD_ADAPTER: Reason.INVALID_ADAPTER,
}
COUNTED_REASONS = {
    ExitCode.STORAGE: Reason.STORAGE_UNAVAILABLE,
    ExitCode.CORRUPT_BASE: Reason.CORRUPT_BASE,
    ExitCode.FAULTY_NODE: Reason.FAULTY_NODE,
    ExitCode.OUT_OF_MEMORY: Reason.OUT_OF_MEMORY,
}
ADVICE = {
    Reason.OUT_OF_MEMORY: "In a new QLoRAFinetune lower training.microBatchSize or training.maxLength, set"
    " training.gradientCheckpointing to full, shard with training.shardingStrategy FULL_SHARD or training.cpuOffload;"
    " for host memory raise resourcesPerNode.limits.memory.",
    Reason.STORAGE_UNAVAILABLE: "Check endpoint, bucket and the Secret's keys of model, dataset and output.",
    Reason.CORRUPT_BASE: "The packed base does not match its checksum: the node's disk or memory is suspect;"
    " the pod moves elsewhere.",
    Reason.FAULTY_NODE: "The pod is replaced; a node with two faults is avoided.",
    Reason.HUNG: "The workers were restarted; if a step may take longer than that, raise progressDeadlineSeconds and"
    " the operator's timing.hangFloorSeconds.",
    Reason.WORKER_FAILED: "See status.lastFailure.logTail.",
    Reason.INVALID_SPEC: "Once that is corrected, create a new QLoRAFinetune.",  # the spec, or what it points to
    Reason.INVALID_DATASET: "Correct the data set and create a new QLoRAFinetune.",
    Reason.INVALID_MODEL: "Point model.uri at a causal language model with its tokenizer in a new QLoRAFinetune.",
    Reason.INVALID_ADAPTER: "Lower training.learningRate or check the data set, then create a new QLoRAFinetune.",
}


@dataclass(frozen=True)
class Ending:
    """One pod's worker, container or place came to an end. `exit_code` None: a disruption from outside."""

    pod_name: str
    node_name: str
    reason: Reason
    exit_code: int | None = None
    message: str = ""
    rank: int | None = None
    step: int = 0
    log_tail: str = ""

    @property
    def counts(self) -> bool:
        return self.exit_code is not None and self.exit_code not in FREE and self.exit_code not in _SIGTERM


def advised(what: str, reason: Reason) -> str:
    """What happened as a sentence with its end, then what to do about it."""
    return f"{what.rstrip('. ')}. {ADVICE.get(reason, '')}".strip()


def describe(ending: Ending) -> str:
    """Who, where, how and what to do, in one or two sentences."""
    who = f"rank {ending.rank} in {ending.pod_name}" if ending.rank is not None else ending.pod_name or "the run"
    where = f" on node {ending.node_name}" if ending.node_name else ""
    how = f" ended with exit code {ending.exit_code}" if ending.exit_code is not None else ""
    what = f": {ending.message}" if ending.message else ""
    return advised(f"{who}{where}{how} at step {ending.step}{what}", ending.reason)


def of_termination(pod_name: str, node_name: str, termination: Termination) -> Ending:
    """A worker's end as its agent reported it."""
    code, message = termination.exit_code, termination.message
    if code in _SIGKILL:
        message = message or "a worker was killed by signal 9, most often for want of host memory"
    return Ending(
        pod_name,
        node_name,
        _reason_of(code),
        code,
        message,
        termination.rank,
        termination.step,
        termination.log_tail,
    )


def of_container(pod: Pod, step: int) -> Ending:
    """A container's end as the kubelet reported it; `step` is the run's newest."""
    assert pod.exit is not None
    if pod.exit.reason == "OOMKilled":
        message = "the container exceeded its memory limit."
        return Ending(pod.name, pod.node, Reason.OUT_OF_MEMORY, int(ExitCode.OUT_OF_MEMORY), message, step=step)
    if pod.exit.termination is not None:
        return of_termination(pod.name, pod.node, pod.exit.termination)
    if pod.exit.code in _SIGKILL or pod.exit.reason in _LOST_WITH_ITS_NODE:
        return Ending(pod.name, pod.node, Reason.POD_LOST, message="the container was killed from outside", step=step)
    code, tail = pod.exit.code, pod.exit.message[-3000:]
    return Ending(pod.name, pod.node, _reason_of(code), code, pod.exit.reason, step=step, log_tail=tail)


def _reason_of(code: int) -> Reason:
    if code == ExitCode.LOST_PEER:
        return Reason.LOST_PEER
    if code in FREE or code in _SIGTERM:
        return Reason.MEMBERS_CHANGED
    known = ExitCode(code) if code in set(ExitCode) else ExitCode.INTERNAL
    return {**FATAL_REASONS, **COUNTED_REASONS}.get(known, Reason.WORKER_FAILED)
