"""A small world around `decide`: an API server that stores status and pods, nodes that run agents, an operator that
loses passes, dies between any two writes, and comes back without its memory. Time is simulated; faults are seeded.

`Simulation.run()` plays one history and checks, at every step, what must always hold; a history that does not settle
once the faults have ceased is an error, too.
"""

import random
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from tests.unit.operator.simulated_agent import SimAgent

from qlora_api.run import NODE_FAULTS, AgentState, Command, ExitCode, RunIdentity, Termination
from qlora_api.status import Member, QLoRAFinetuneStatus
from qlora_api.types import ElasticPolicy, QLoRAFinetuneSpec
from qlora_operator.conditions import is_over
from qlora_operator.decide import decide
from qlora_operator.settings import Settings
from qlora_operator.state import CreatePod, Decision, DeletePod, DeleteRun, Exit, Observed, Pod, PodIdentity, Run
from qlora_operator.table import RunTable

TICK = 0.5
START = datetime(2026, 1, 1, tzinfo=UTC)
SETTINGS = Settings(
    "trainer:test", "https://coordinator", start_wait_seconds=3.0, prepare_timeout_seconds=20.0, blocked_seconds=60.0
)
WORKER_ENDS = (
    ExitCode.INTERNAL,
    ExitCode.OUT_OF_MEMORY,
    ExitCode.LOST_PEER,
    *sorted(NODE_FAULTS),
    ExitCode.BAD_DATA,
    ExitCode.STORAGE,
)


@dataclass
class Simulation:
    """One history."""

    seed: int
    max_nodes: int = 3
    min_nodes: int = 1
    total: int = 20
    faulty_seconds: float = 40.0
    limit_seconds: float = 400.0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        spec = QLoRAFinetuneSpec.model_validate(
            {
                "model": {"uri": "hf://o/m"},
                "dataset": {"uri": "s3://data/x"},
                "output": {"uri": "s3://out"},
                "elasticPolicy": {"minNodes": self.min_nodes, "maxNodes": self.max_nodes},
                "failurePolicy": {"maxFailures": self.rng.choice([0, 2, 5])},
            }
        )
        self.the_run = Run(RunIdentity(namespace="n", name="r", uid="run-uid"), spec, START)
        self.status = QLoRAFinetuneStatus()
        self.pods: dict[str, Pod] = {}
        self.born: dict[str, float] = {}
        self.agents: dict[str, SimAgent] = {}
        self.dead_nodes: set[str] = set()
        self.table: RunTable | None = None
        self.now = 0.0
        self.next_pass = 0.0
        self.step = 0
        self.uids = 0
        self.crashes = 0
        self.generations: dict[int, tuple[Member, ...]] = {}
        self.deleted = False

    # The history.

    def run(self) -> str:
        """Play until the run has ended and nothing is left; returns the end's reason."""
        while self.now < self.limit_seconds:
            self.now += TICK
            if self.now < self.faulty_seconds:
                self._fault()
            elif self.the_run.spec.suspend:
                self._change({"suspend": False})
            self._nodes()
            self._train()
            self._talk()
            if self.now >= self.next_pass or self.rng.random() < 0.2:
                self._pass()
            if is_over(self.status) and all(pod.deleting for pod in self.pods.values()):
                return next(c.reason for c in self.status.conditions if c.type in ("Complete", "Failed"))
        raise AssertionError(f"seed {self.seed} did not settle: {self.status.to_wire()} {self.pods} {self.agents}")

    # The operator.

    def _pass(self) -> None:
        if self.rng.random() < 0.1 and self.now < self.faulty_seconds:
            return  # a lost pass
        if self.table is None:
            self.table = RunTable(known_since=self.now)
        observed = self._observe(self.table)
        decision = decide(observed, SETTINGS)
        if self.rng.random() < 0.05:
            assert decide(observed, SETTINGS) == decision, "the same observation, the same decision"
        self.next_pass = self.now + decision.requeue_after
        self._check(observed, decision)
        self._carry_out(decision)

    def _observe(self, table: RunTable) -> Observed:
        pods = tuple(replace(pod, age=self.now - self.born[pod.uid]) for pod in self.pods.values())
        heard = vars(table.heard(self.now))
        return Observed(run=self.the_run, status=self.status, pods=pods, now=self._clock(), **heard)

    def _carry_out(self, decision: Decision) -> None:
        """Status, membership, actions, in this order; the process may die before any of them."""
        dies_after = self.rng.randint(0, 4) if self.now < self.faulty_seconds and self.rng.random() < 0.05 else 99
        writes = 0
        if decision.status != self.status:
            if writes == dies_after:
                return self._die()
            self.status, writes = decision.status, writes + 1
        if writes == dies_after:
            return self._die()
        assert self.table is not None
        self.table.publish(decision.membership, self.now)
        self.table.keep([pod.uid for pod in self.pods.values()], self.now)
        for action in decision.actions:
            if writes == dies_after:
                return self._die()
            writes += 1
            match action:
                case CreatePod(name, body):
                    self._create(name, body)
                case DeletePod(name, uid):
                    if name in self.pods and self.pods[name].uid == uid:
                        self.pods[name] = replace(self.pods[name], deleting=True)
                case DeleteRun():
                    self.deleted = True
        return None

    def _die(self) -> None:
        self.crashes += 1
        self.table, self.next_pass = None, self.now + self.rng.choice([0.5, 3.0, 8.0])

    def _create(self, name: str, body: dict) -> None:
        if name in self.pods:
            return
        self.uids += 1
        labels = body["metadata"]["labels"]
        uid = f"uid-{self.uids}"
        self.born[uid] = self.now
        index, incarnation = int(labels["qlora.dev/index"]), int(labels["qlora.dev/incarnation"])
        self.pods[name] = Pod(name=name, uid=uid, index=index, incarnation=incarnation)

    # What must always hold.

    def _check(self, o: Observed, decision: Decision) -> None:
        old, new = o.status, decision.status
        if is_over(old):
            quiet = new.model_copy(update={"nodes": old.nodes, "nodes_summary": old.nodes_summary})
            assert quiet == old, "terminal is sticky"
            assert not any(isinstance(action, CreatePod) for action in decision.actions)
        assert new.restarts.failures >= old.restarts.failures
        assert new.restarts.disruptions >= old.restarts.disruptions
        incarnations = {slot.index: slot.incarnation for slot in old.slots}
        assert all(slot.incarnation >= incarnations.get(slot.index, 0) for slot in new.slots), "incarnations only rise"
        assert new.generation in (old.generation, old.generation + 1)
        assert decision.membership.generation == new.generation
        assert decision.membership.prepare in (new.generation, new.generation + 1)
        assert not {a.name for a in decision.actions if isinstance(a, CreatePod)} & set(self.pods)
        most = o.run.spec.elastic_policy.max_nodes
        assert decision.membership.command == Command.RUN or not self._creates(decision)
        places = {(slot.index, slot.incarnation) for slot in new.slots if slot.index < most}
        doomed = {action.uid for action in decision.actions if isinstance(action, DeletePod)}
        left = [pod for pod in o.pods if pod.live and pod.uid not in doomed]
        assert len(left) + self._creates(decision) <= most, "never more pods than asked for"
        assert all((pod.index, pod.incarnation) in places for pod in left), "nothing superseded is left alone"
        if new.generation > old.generation:
            self._check_generation(o, new)

    @staticmethod
    def _creates(decision: Decision) -> int:
        return sum(isinstance(action, CreatePod) for action in decision.actions)

    def _check_generation(self, o: Observed, new: QLoRAFinetuneStatus) -> None:
        assert self.min_nodes <= len(new.members) <= o.run.spec.elastic_policy.max_nodes
        agents = {agent.pod_uid: agent for agent in o.agents}
        live = {pod.uid for pod in o.pods if pod.live}
        for member in new.members:
            agent = agents[member.pod_uid]
            assert agent.report.state == AgentState.READY and agent.age <= SETTINGS.lease_seconds
            assert member.pod_uid in live, "members are live"
        assert len({member.pod_uid for member in new.members}) == len(new.members)
        survivors = [
            m.pod_uid for m in o.status.members if agents.get(m.pod_uid) and agents[m.pod_uid].report.generation
        ]
        kept = [m.pod_uid for m in new.members if m.pod_uid in survivors]
        assert kept == [uid for uid in survivors if uid in kept], "survivors keep their order"
        assert [m.pod_uid for m in new.members][: len(kept)] == kept, "newcomers go last"

    def _change(self, update: dict[str, object]) -> None:
        """A person edits the spec."""
        spec, generation = self.the_run.spec.model_copy(update=update), self.the_run.generation + 1
        self.the_run = replace(self.the_run, spec=spec, generation=generation)

    # Nodes and agents.

    def _clock(self) -> datetime:
        return START + timedelta(seconds=self.now)

    def _nodes(self) -> None:
        for name, pod in list(self.pods.items()):
            dead = pod.node in self.dead_nodes
            if pod.uid in self.agents and self.agents[pod.uid].stopped and not dead:
                del self.agents[pod.uid]
                ended = replace(pod, ended=True, restarts=pod.restarts + 1, exit=Exit(ExitCode.STOPPED, "Error"))
                pod = self.pods[name] = ended
            if pod.deleting and not dead and self.rng.random() < 0.4:
                del self.pods[name]
                self.agents.pop(pod.uid, None)
            elif pod.phase == "Pending" and not pod.deleting and self.rng.random() < 0.6:
                identity = PodIdentity("n", "r-qlora", name, pod.uid)
                self.agents[pod.uid] = SimAgent(identity, self.now + self.rng.uniform(0, 6))
                self.pods[name] = replace(pod, phase="Running", node=f"node-{self.uids}-{name}")
            elif pod.ended and not pod.deleting and not dead and self.rng.random() < 0.5:
                self.pods[name] = replace(pod, ended=False)
                identity = PodIdentity("n", "r-qlora", name, pod.uid)
                self.agents[pod.uid] = SimAgent(identity, self.now + self.rng.uniform(0, 3))

    def _train(self) -> None:
        """A step when every member of the newest generation runs; then the end."""
        runners = [agent for agent in self.agents.values() if agent.state == AgentState.RUNNING]
        for agent in self.agents.values():
            if agent.state == AgentState.WARMING and self.now >= agent.warm_at:
                agent.state = AgentState.READY
        generation = self.status.generation
        members = {member.pod_uid for member in self.status.members}
        active = [agent for agent in runners if agent.joined == generation and agent.pod.pod_uid in members]
        if members and len(active) == len(members):
            self.step += 1
            if self.step >= self.total:
                for agent in active:
                    agent.state = AgentState.FINISHED

    def _talk(self) -> None:
        """Reports to the coordinator and answers back; some reports stay under way for a while."""
        if self.table is None:
            return
        for agent in list(self.agents.values()):
            if self.now < agent.silent_until:
                continue
            report = agent.in_flight or agent.report(self.step, self.total)
            agent.in_flight = None
            if self.rng.random() < 0.1:
                agent.in_flight = report
                continue
            is_news = self.table.receive(agent.pod, report, self.now)
            if is_news:
                self.next_pass = min(self.next_pass, self.now)
            if self.table.answer is not None and self.rng.random() < 0.95:
                agent.learn(self.table.answer, self.now)

    def _fault(self) -> None:
        """At most one fault a tick."""
        live = [pod for pod in self.pods.values() if pod.phase == "Running" and pod.uid in self.agents]
        if not live or self.rng.random() > 0.12:
            return
        pod = self.rng.choice(live)
        agent = self.agents[pod.uid]
        match self.rng.randint(0, 9):
            case 0:  # the node dies and says nothing
                self.dead_nodes.add(pod.node)
                del self.agents[pod.uid]
            case 1:  # evicted
                self.pods[pod.name] = replace(pod, deleting=True, reason="EvictionByEvictionAPI")
                agent.state = AgentState.LEAVING
            case 2:  # deleted with force
                del self.pods[pod.name]
                del self.agents[pod.uid]
            case 3:  # PID 1 dies
                code = self.rng.choice([1, 137])
                self.pods[pod.name] = replace(pod, ended=True, restarts=pod.restarts + 1, exit=Exit(code, "Error"))
                del self.agents[pod.uid]
            case 4:  # a worker fails
                if agent.state in (AgentState.RUNNING, AgentState.WARMING):
                    code = self.rng.choice(WORKER_ENDS)
                    agent.termination = Termination(exit_code=code, reason="X", step=self.step, rank=pod.index)
                    agent.state = AgentState.FAILED
            case 5:  # partitioned for a while
                agent.silent_until = self.now + self.rng.choice([1.0, 4.0, 15.0])
            case 8:  # suspended or resumed
                self._change({"suspend": not self.the_run.spec.suspend})
            case 9:  # scaled
                most = self.rng.randint(self.min_nodes, self.max_nodes)
                self._change({"elastic_policy": ElasticPolicy(min_nodes=self.min_nodes, max_nodes=most)})
            case 7:  # the agent process begins anew, at once
                self.agents[pod.uid] = SimAgent(agent.pod, self.now)
            case 6:  # its workers do not answer
                agent.stubborn_until = self.now + self.rng.choice([3.0, 30.0])
