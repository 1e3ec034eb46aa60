"""Short words for observations: `observed(pods=[...], agents=[...], status={...}, **spec)`."""

from datetime import UTC, datetime, timedelta
from typing import Any

from qlora_api.names import ConditionType, Reason
from qlora_api.run import AgentState, Report, RunIdentity, Termination
from qlora_api.status import Condition, Member, Progress, QLoRAFinetuneStatus, Slot
from qlora_api.types import QLoRAFinetuneSpec
from qlora_operator.settings import Settings
from qlora_operator.state import Agent, Decision, Observed, Pod, Run

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
SETTINGS = Settings("trainer:1", "https://coordinator:8443")
SPEC: dict[str, Any] = {
    "model": {"uri": "hf://org/model"},
    "dataset": {"uri": "s3://data/train.jsonl"},
    "output": {"uri": "s3://out/runs"},
    "elasticPolicy": {"minNodes": 1, "maxNodes": 2},
}


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def run(**spec: Any) -> Run:
    identity = RunIdentity(namespace="ns", name="r", uid="run-uid")
    return Run(identity, QLoRAFinetuneSpec.model_validate({**SPEC, **spec}), ago(100))


def pod(index: int, incarnation: int = 0, **fields: Any) -> Pod:
    defaults: dict[str, Any] = {"phase": "Running", "age": 100.0, "node": f"node-{index}"}
    name = f"r-{index}-{incarnation}"
    return Pod(name=name, uid=f"uid-{name}", index=index, incarnation=incarnation, **{**defaults, **fields})


def agent(of: Pod, state: AgentState, generation: int = 0, **fields: Any) -> Agent:
    clock = {key: fields.pop(key) for key in ("age", "dropped", "state_age") if key in fields}
    step, total, termination = fields.pop("step", None), fields.pop("total", 100), fields.get("termination")
    progress = None if step is None else Progress(step=step, total_steps=total)
    known = {"known_generation": generation, "progress": progress, **fields}
    report = Report(address="10.0.0.1", state=state, generation=generation, **known)
    return Agent(of.name, of.uid, report, failure=termination, failure_generation=generation, **clock)


def running(of: Pod, generation: int = 1, **fields: Any) -> Agent:
    return agent(of, AgentState.RUNNING, generation, **fields)


def ended(code: int, step: int = 5, **fields: Any) -> Termination:
    return Termination(exit_code=code, reason="X", message="it broke", step=step, **fields)


def condition(kind: ConditionType, value: str, reason: Reason, since: float = 50) -> Condition:
    return Condition.model_validate({"type": kind, "status": value, "reason": reason, "lastTransitionTime": ago(since)})


def training(*pods: Pod, **fields: Any) -> QLoRAFinetuneStatus:
    """The status of a run whose generation 1 are these pods."""
    members = [Member(pod_uid=p.uid, pod_name=p.name, address="10.0.0.1", node_name=p.node) for p in pods]
    base = QLoRAFinetuneStatus(
        observed_generation=1,
        start_time=ago(90),
        generation=1,
        members=members,
        slots=[Slot(index=p.index, incarnation=p.incarnation) for p in pods],
        conditions=[condition(ConditionType.RUNNING, "True", Reason.TRAINING)],
    )
    return base.model_copy(update=fields)


def observed(
    pods: list[Pod],
    agents: list[Agent],
    status: QLoRAFinetuneStatus | None = None,
    spec: dict[str, Any] | None = None,
    **fields: Any,
) -> Observed:
    clocks = {"heard_age": 50.0, "listening_age": 60.0, "generation_age": 40.0, "step_age": 1.0}
    return Observed(
        run=run(**(spec or {})),
        status=status or QLoRAFinetuneStatus(),
        pods=tuple(pods),
        agents=tuple(agents),
        now=NOW,
        **{**clocks, **fields},
    )


def names_of(decision: Decision, kind: type) -> list[str]:
    """Names of the pods that actions of this kind concern."""
    return [action.name for action in decision.actions if isinstance(action, kind)]
