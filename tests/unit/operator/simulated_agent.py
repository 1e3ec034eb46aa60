"""The simulator's agent: the rules of a pod's PID 1 about what it reports and how it takes an answer."""

from dataclasses import dataclass, field

from qlora_api.run import AgentState, Command, Membership, Report, Termination
from qlora_api.status import Artifacts, Progress
from qlora_operator.state import PodIdentity

CALLABLE = (AgentState.RUNNING, AgentState.FAILED)


@dataclass
class SimAgent:
    """PID 1 of a pod."""

    pod: PodIdentity
    warm_at: float
    state: AgentState = AgentState.WARMING
    joined: int = 0
    view: Membership = field(default_factory=Membership)
    termination: Termination | None = None
    stubborn_until: float = 0.0  # does not react to prepare
    silent_until: float = 0.0  # partitioned: neither reports nor learns
    in_flight: Report | None = None  # a report made earlier and still under way
    stopped: bool = False  # PID 1 ends
    floor: int | None = None  # only newer generations are joined; set by the first answer

    def report(self, step: int, total: int) -> Report:
        done = self.state == AgentState.FINISHED
        first = bool(self.view.members) and self.view.members[0].pod_uid == self.pod.pod_uid
        artifacts = Artifacts(adapter_uri="a", manifest_uri="m", adapter_bytes=1, adapter_sha256="0")
        return Report(
            address="10.0.0.1",
            state=self.state,
            generation=self.joined,
            known_generation=self.view.generation,
            known_prepare=self.view.prepare,
            known_command=self.view.command,
            progress=Progress(step=step, total_steps=total)
            if self.state in (AgentState.RUNNING, AgentState.FINISHED)
            else None,
            termination=self.termination,
            artifacts=artifacts if done and first else None,
        )

    def learn(self, view: Membership, now: float) -> None:
        if view.generation < self.view.generation:
            return
        self.view = view
        self.floor = view.generation if self.floor is None else self.floor
        mine = self.pod.pod_uid in [member.pod_uid for member in view.members]
        if view.command == Command.STOP:
            self.stopped = self.stopped or now >= self.stubborn_until
            return
        called = view.prepare > self.joined or not mine
        if self.state == AgentState.READY and mine and view.generation > max(self.joined, self.floor):
            self.joined, self.state, self.termination = view.generation, AgentState.RUNNING, None
        elif called and self.joined and now >= self.stubborn_until and self.state in CALLABLE:
            self.state = AgentState.READY
