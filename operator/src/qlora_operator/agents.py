"""What the agents' reports say about a run: who is alive, who may be a member, how far it is, how workers ended.

An agent is alive while its lease runs; a broken connection shortens the lease. After the operator's own restart nobody
has reported yet: members whose pods are there are presumed alive until they had time to find the new process.
"""

from collections.abc import Iterable

from qlora_api.memory import Plan
from qlora_api.names import Reason
from qlora_api.run import METRIC_STEP_WORK, AgentState, ExitCode
from qlora_api.status import Artifacts, CheckpointStatus, Member, Progress, Slot
from qlora_operator import exits
from qlora_operator.exits import Ending
from qlora_operator.membership import Candidate, View
from qlora_operator.settings import Settings
from qlora_operator.state import Agent, Observed, Pod, Refusal, Trouble
from qlora_operator.stragglers import Part

CANDIDATES = (AgentState.READY, AgentState.RUNNING, AgentState.FAILED, AgentState.FINISHED)
_SEVERITY = (
    Reason.INVALID_SPEC,
    Reason.QUOTA_EXCEEDED,
    Reason.MISSING_SECRET,
    Reason.IMAGE_PULL_FAILED,
    Reason.STORAGE_UNAVAILABLE,
    Reason.MOUNT_FAILED,
    Reason.UNSCHEDULABLE,
    Reason.PODS_PENDING,
)
# An agent that this process has not heard yet is silent after so many times silent_seconds, by the operator's listening
# time: a member's when none of the run reports, a newcomer's because its pod runs and yet it never spoke.
_UNHEARD_MEMBER, _UNHEARD_NEWCOMER = 3, 12


def agent_of(o: Observed, pod: Pod) -> Agent | None:
    """The agent of this very pod."""
    return next((agent for agent in o.agents if agent.pod_uid == pod.uid), None)


def is_alive(agent: Agent, settings: Settings) -> bool:
    """Whether its lease runs."""
    if agent.dropped is not None and agent.dropped >= settings.drop_seconds:
        return False
    return agent.age <= settings.lease_seconds


def is_member(o: Observed, pod_uid: str) -> bool:
    """Whether the pod is in the current generation."""
    return any(member.pod_uid == pod_uid for member in o.status.members)


def silence(o: Observed, pod: Pod) -> float:
    """Seconds for which a pod that should report has not, weighted for those that were never heard."""
    agent = agent_of(o, pod)
    if agent is not None:
        return agent.age
    if is_member(o, pod.uid):
        return max(o.heard_age, o.listening_age / _UNHEARD_MEMBER)
    return min(o.listening_age, pod.age) / _UNHEARD_NEWCOMER if pod.phase == "Running" else 0.0


def current_pods(o: Observed, slots: Iterable[Slot]) -> tuple[Pod, ...]:
    """The live pods that hold a wanted place, by place."""
    places = {(slot.index, slot.incarnation) for slot in slots if slot.index < o.run.spec.elastic_policy.max_nodes}
    held = [pod for pod in o.pods if (pod.index, pod.incarnation) in places and pod.live]
    return tuple(sorted(held, key=lambda pod: pod.index))


def candidates(o: Observed, slots: Iterable[Slot], settings: Settings) -> tuple[Candidate, ...]:
    """Those who may be members of the next generation, or are members of this one."""
    found = (_candidate(o, pod, settings) for pod in current_pods(o, slots) if not pod.ended)
    return tuple(candidate for candidate in found if candidate is not None)


def _candidate(o: Observed, pod: Pod, settings: Settings) -> Candidate | None:
    agent = agent_of(o, pod)
    if agent is None:
        return _presumed(o, pod, settings)
    report = agent.report
    if not is_alive(agent, settings) or report.state not in CANDIDATES:
        return None
    if report.state != AgentState.READY and not is_member(o, pod.uid):
        return None
    return Candidate(
        Member(pod_uid=pod.uid, pod_name=pod.name, address=report.address, node_name=pod.node),
        pod.index,
        report.state,
        report.generation,
        report.known_generation,
        fresh=agent.dropped is None and agent.age <= settings.fresh_seconds,
        highest=agent.highest,
        stalled=_is_stalled(o, agent, settings),
        trains=report.progress is not None and report.progress.step < report.progress.total_steps,
    )


def _is_stalled(o: Observed, agent: Agent, settings: Settings) -> bool:
    """It knows this generation (or had long enough to learn of it) and does not come in."""
    limit = settings.lease_seconds if agent.report.known_generation >= o.status.generation else settings.silent_seconds
    return agent.report.generation < o.status.generation and o.generation_age > limit


def _presumed(o: Observed, pod: Pod, settings: Settings) -> Candidate | None:
    """A member that this process has not heard yet and that may still be looking for it."""
    member = next((member for member in o.status.members if member.pod_uid == pod.uid), None)
    if member is None or silence(o, pod) > settings.lease_seconds:
        return None
    generation = o.status.generation
    return Candidate(member, pod.index, AgentState.RUNNING, generation, generation, fresh=False)


def view_of(o: Observed, slots: list[Slot], settings: Settings) -> View:
    """What the membership depends on."""
    policy = o.run.spec.elastic_policy
    found = candidates(o, slots, settings)
    standing = {candidate.member.pod_uid for candidate in found if candidate.standing}
    blocked = len(troubles(o)) + len(o.refusals)
    return View(
        generation=o.status.generation,
        members=tuple(o.status.members),
        candidates=found,
        min_nodes=policy.min_nodes,
        max_nodes=policy.max_nodes,
        expected=max(policy.max_nodes - blocked, policy.min_nodes),
        prepare_age=o.prepare_age,
        longest_standing=max((agent.state_age for agent in o.agents if agent.pod_uid in standing), default=0.0),
        hung=is_hung(o, settings),
        settle_seconds=settings.settle_seconds,
        start_wait_seconds=settings.start_wait_seconds,
    )


def is_hung(o: Observed, settings: Settings) -> bool:
    """All members run, none of them gets anything done."""
    return all_run(o, settings) and quiet_seconds(o) > hang_limit(o, settings)


def was_hung(o: Observed, settings: Settings) -> bool:
    """The members had been quiet for too long when they were called; they stand now, and their end is judged."""
    if o.prepare_age is None or o.status.generation == 0:
        return False
    return quiet_seconds(o) - o.prepare_age > hang_limit(o, settings)


def quiet_seconds(o: Observed) -> float:
    """Since a step, an evaluation's batch or anything else was done under this generation."""
    return min(o.step_age, o.activity_age, o.generation_age)


def all_run(o: Observed, settings: Settings) -> bool:
    """Every member is alive and reports that its workers of this generation run."""
    heard = [agent for agent in _heard_members(o) if is_alive(agent, settings)]
    running = {agent.pod_uid for agent in heard if agent.report.state == AgentState.RUNNING}
    return o.status.generation > 0 and all(member.pod_uid in running for member in o.status.members)


def hang_limit(o: Observed, settings: Settings) -> float:
    """Quiet seconds that mean a hang: the deadline, or many median steps; start and end of the workers take their time.

    The low floor holds once this generation has done a step (kernels are compiled then, files read) and while its
    workers tell what they do between steps (trainers before `Report.activity` do not).
    """
    deadline = float(o.run.spec.progress_deadline_seconds)
    progress = o.status.progress
    if o.median_step is None or (progress.total_steps and progress.step >= progress.total_steps):
        return deadline
    tells = all(agent.report.activity is not None for agent in _heard_members(o))
    settled = tells and o.stepped_generation == o.status.generation
    floor = settings.hang_floor_seconds if settled else settings.start_hang_seconds
    return min(deadline, max(floor, settings.hang_factor * o.median_step))


def _heard_members(o: Observed) -> list[Agent]:
    """Agents of members that speak of this generation."""
    generation = o.status.generation
    return [agent for agent in o.agents if is_member(o, agent.pod_uid) and agent.report.generation == generation]


def parts(o: Observed) -> tuple[Part, ...]:
    """What every member of this generation says about its own part of a step, by rank."""
    told = {agent.pod_uid: agent.report.metrics.get(METRIC_STEP_WORK) for agent in _heard_members(o)}
    return tuple(Part(member.pod_name, member.node_name, told.get(member.pod_uid)) for member in o.status.members)


def memory_plan(o: Observed) -> Plan | None:
    """What the members of this generation plan alike."""
    return next((agent.report.plan for agent in _heard_members(o) if agent.report.plan is not None), None)


def newest_progress(o: Observed) -> Progress:
    """The members' furthest progress, or what status says; a worker that starts knows no total yet and has none."""
    told = [agent.report.progress for agent in _heard_members(o)]
    reports = [progress for progress in told if progress is not None and progress.total_steps]
    return max(reports, key=lambda progress: progress.step, default=o.status.progress)


def newest_checkpoint(o: Observed) -> CheckpointStatus | None:
    """The newest complete checkpoint that anyone knows of; it never goes back."""
    known = [agent.report.checkpoint for agent in o.agents if agent.report.checkpoint is not None]
    if o.status.checkpoint is not None:
        known.append(o.status.checkpoint)
    return max(known, key=lambda checkpoint: checkpoint.step, default=None)


def troubles(o: Observed) -> list[tuple[Pod, Trouble]]:
    """What keeps pods that hold a place from starting, by pod."""
    found = []
    for pod in current_pods(o, o.status.slots):
        trouble = pod.trouble or _storage_trouble(o, pod)
        if trouble is not None:
            found.append((pod, trouble))
    return found


def _storage_trouble(o: Observed, pod: Pod) -> Trouble | None:
    """A newcomer that cannot read its model or data; it goes on trying by itself."""
    agent = agent_of(o, pod)
    if agent is None or agent.failure is None or agent.failure.exit_code != ExitCode.STORAGE:
        return None
    if agent.highest > 0 or agent.report.state not in (AgentState.WARMING, AgentState.FAILED):
        return None
    reason = Reason.STORAGE_UNAVAILABLE
    return Trouble(reason, exits.advised(f"{pod.name}: {agent.failure.message}", reason))


def worst_trouble(o: Observed) -> Trouble | None:
    """What keeps pods from starting; the one that a person should look at first."""
    found = [refusal_trouble(refusal) for refusal in o.refusals]
    found += [trouble for _, trouble in troubles(o)]
    return min(found, key=lambda trouble: _SEVERITY.index(trouble.reason), default=None)


def only_spare_places_lack_room(o: Observed) -> bool:
    """What is wrong is that there is no room for places beyond minNodes; the others have theirs."""
    trouble = worst_trouble(o)
    if trouble is None or trouble.reason not in (Reason.UNSCHEDULABLE, Reason.QUOTA_EXCEEDED):
        return False
    return len(current_pods(o, o.status.slots)) - len(troubles(o)) >= o.run.spec.elastic_policy.min_nodes


def refusal_trouble(refusal: Refusal) -> Trouble:
    """Why the API server does not create a pod."""
    if refusal.status == 403 and "exceeded quota" in refusal.message:
        advice = "raise the ResourceQuota or lower elasticPolicy.maxNodes"
        return Trouble(Reason.QUOTA_EXCEEDED, f"{refusal.message}; {advice}")
    if refusal.status == 403 and "violates PodSecurity" not in refusal.message:
        return Trouble(Reason.PODS_PENDING, f"the API server does not admit the pods: {refusal.message}")
    return Trouble(
        Reason.INVALID_SPEC,
        f"the API server refuses the run's pods: {refusal.message}; correct podTemplate, resourcesPerNode or the"
        " namespace's pod security level in a new QLoRAFinetune",
    )


def artifacts(o: Observed) -> Artifacts | None:
    """What a finished member says it has uploaded."""
    finished = (a.report.artifacts for a in o.agents if a.report.state == AgentState.FINISHED)
    return next((found for found in finished if found is not None), None)


def ends_of_generation(o: Observed, slots: Iterable[Slot], settings: Settings) -> tuple[Ending, ...]:
    """How members' workers of this very generation ended, those of pods that still hold their place.

    That workers lost a peer, or were quiet, explains nothing when a member is gone: its own end is judged with its
    place (one that hung and was replaced counts once), and a resumed run's are gone because they were told to.
    """
    present = {candidate.member.pod_uid for candidate in candidates(o, slots, settings)}
    someone_gone = any(member.pod_uid not in present for member in o.status.members)
    ends = []
    for pod in current_pods(o, slots):
        agent = agent_of(o, pod)
        if agent is None or agent.failure is None or not is_member(o, pod.uid):
            continue
        followed = someone_gone and agent.failure.exit_code == ExitCode.LOST_PEER
        if agent.failure_generation == o.status.generation and not followed:
            ends.append(exits.of_termination(pod.name, pod.node, agent.failure))
    if is_hung(o, settings) or (was_hung(o, settings) and not someone_gone):
        seconds = int(hang_limit(o, settings))
        ends.append(
            Ending("", "", Reason.HUNG, int(ExitCode.INTERNAL), f"nothing was done for {seconds} s.", step=_step(o))
        )
    return tuple(ends)


def _step(o: Observed) -> int:
    return newest_progress(o).step
