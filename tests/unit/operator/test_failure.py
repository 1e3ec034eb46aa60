"""What ends mean: who is to blame, what counts, what ends the run, in which words."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.operator.build import NOW, ago, ended, pod

from qlora_api.names import Reason
from qlora_api.run import ExitCode, Termination
from qlora_api.status import FailureRecord, LastFailure, QLoRAFinetuneStatus
from qlora_api.types import FailurePolicy
from qlora_operator import exits, failure
from qlora_operator.exits import Ending
from qlora_operator.failure import Verdict
from qlora_operator.state import Exit

POLICY = FailurePolicy(max_failures=3, window_seconds=600)
HOUR = 3600.0


def judge(*endings: Ending, status: QLoRAFinetuneStatus | None = None, policy: FailurePolicy = POLICY) -> Verdict:
    verdict = failure.judge(endings, status or QLoRAFinetuneStatus(), policy, NOW)
    assert verdict is not None
    return verdict


def exit_of(code: int, name: str = "r-0-0", step: int = 5, **fields: object) -> Ending:
    return exits.of_termination(name, "node-a", ended(code, step, **fields))  # type: ignore[arg-type]


def records(*steps: int, reason: Reason = Reason.WORKER_FAILED, age: float = 60) -> QLoRAFinetuneStatus:
    return QLoRAFinetuneStatus(failures=[FailureRecord(time=ago(age), reason=reason, step=s) for s in steps])


def test_nothing_ended() -> None:
    assert failure.judge((), QLoRAFinetuneStatus(), POLICY, NOW) is None


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (ExitCode.BAD_CONFIG, Reason.INVALID_SPEC),
        (ExitCode.BAD_DATA, Reason.INVALID_DATASET),
        (ExitCode.BAD_MODEL, Reason.INVALID_MODEL),
        (ExitCode.BAD_ADAPTER, Reason.INVALID_ADAPTER),
    ],
)
def test_what_cannot_get_better_fails_at_once(code: ExitCode, reason: Reason) -> None:
    verdict = judge(exit_of(ExitCode.INTERNAL, "r-1-0"), exit_of(code))
    assert (verdict.effect, verdict.reason) == ("Fail", reason)
    assert "it broke" in verdict.message and exits.ADVICE[reason] in verdict.message


@pytest.mark.parametrize("code", [ExitCode.OK, ExitCode.STOPPED, ExitCode.FENCED, 143, -15])
def test_what_was_asked_for_is_no_failure(code: int) -> None:
    assert judge(exit_of(code)).effect == "Ignore"


def test_a_lost_peer_is_free_and_explained_by_the_other_end() -> None:
    assert judge(exit_of(ExitCode.LOST_PEER)).effect == "Free"
    verdict = judge(exit_of(ExitCode.LOST_PEER), exit_of(ExitCode.OUT_OF_MEMORY, "r-1-0", rank=1))
    assert (verdict.effect, verdict.reason, verdict.ending.pod_name) == ("Count", Reason.OUT_OF_MEMORY, "r-1-0")


def test_out_of_memory_says_which_knob() -> None:
    assert "training.microBatchSize" in judge(exit_of(ExitCode.OUT_OF_MEMORY)).message


@pytest.mark.parametrize("code", [1, -9, 137, -11, ExitCode.INTERNAL])
def test_unknown_ends_count_as_failed_workers(code: int) -> None:
    assert (judge(exit_of(code)).effect, judge(exit_of(code)).reason) == ("Count", Reason.WORKER_FAILED)


def test_the_window_forgets() -> None:
    assert judge(exit_of(1), status=records(1, 2, 3)).reason == Reason.FAILURE_LIMIT_REACHED
    assert judge(exit_of(1), status=records(1, 2, 3, age=601)).effect == "Count"
    assert judge(exit_of(1), policy=FailurePolicy(max_failures=0)).effect == "Fail"


def test_the_third_failure_at_one_step_ends_the_run() -> None:
    verdict = judge(exit_of(1, step=7), status=records(7, 7), policy=FailurePolicy(max_failures=100))
    assert (verdict.effect, verdict.reason) == ("Fail", Reason.REPEATED_STEP_FAILURE)
    assert judge(exit_of(1, step=8), status=records(7, 7)).effect == "Count"
    storage = records(7, 7, reason=Reason.STORAGE_UNAVAILABLE)
    assert judge(exit_of(ExitCode.STORAGE, step=7), status=storage).effect == "Count"


def test_what_befalls_several_pods_at_once_counts_once() -> None:
    last = LastFailure(time=ago(3), reason=Reason.STORAGE_UNAVAILABLE, pod_name="r-0-0", step=5)
    status = QLoRAFinetuneStatus(last_failure=last)
    assert judge(exit_of(ExitCode.STORAGE, "r-1-0"), status=status).effect == "Ignore"
    assert judge(exit_of(ExitCode.STORAGE, "r-0-0"), status=status).effect == "Count"
    assert judge(exit_of(ExitCode.STORAGE, "r-0-1"), status=status).effect == "Count", "the place's next pod"
    assert judge(exit_of(ExitCode.OUT_OF_MEMORY, "r-1-0"), status=status).effect == "Count"
    assert failure.judge((exit_of(ExitCode.STORAGE, "r-1-0"),), status, POLICY, ago(-60)).effect == "Count"


def test_disruptions_are_judged_one_by_one_exits_together() -> None:
    lost = Ending("r-0-0", "node-a", Reason.SILENT)
    groups = failure.incidents((lost, exit_of(1, "r-1-0"), lost, exit_of(1, "r-2-0")))
    assert [len(group) for group in groups] == [1, 1, 2]


def test_a_failure_is_remembered_with_all_that_a_person_asks_first() -> None:
    ending = exit_of(ExitCode.INTERNAL, rank=3, log_tail="last words")
    status = failure.record(judge(ending), QLoRAFinetuneStatus(), POLICY, NOW, HOUR)
    assert (status.restarts.failures, status.restarts.disruptions) == (1, 0)
    assert status.restarts.by_reason == {"WorkerFailed": 1}
    last = status.last_failure
    assert last is not None and (last.rank, last.node_name, last.exit_code, last.step) == (3, "node-a", 70, 5)
    assert last.log_tail == "last words" and "rank 3 in r-0-0 on node node-a ended with exit code 70" in last.message


def test_disruptions_are_counted_apart_and_silent_nodes_avoided() -> None:
    verdict = judge(Ending("r-0-0", "node-a", Reason.SILENT, message="quiet"))
    status = failure.record(verdict, QLoRAFinetuneStatus(), POLICY, NOW, HOUR)
    assert (status.restarts.failures, status.restarts.disruptions) == (0, 1)
    assert status.avoided_nodes == ["node-a"] and status.last_failure is None and status.failures == []


def test_a_node_at_fault_twice_is_avoided() -> None:
    status = QLoRAFinetuneStatus()
    for expected in ([], ["node-a"], ["node-a"]):
        status = failure.record(judge(exit_of(1)), status, POLICY, NOW, HOUR)
        assert status.avoided_nodes == expected
    corrupt = failure.record(judge(exit_of(ExitCode.CORRUPT_BASE)), QLoRAFinetuneStatus(), POLICY, NOW, HOUR)
    assert corrupt.avoided_nodes == ["node-a"]


def test_a_faulty_node_counts_and_the_step_has_nothing_to_do_with_it() -> None:
    """Three bad nodes in a row at step 0 are no reason to give the run up before maxFailures."""
    fault = exit_of(ExitCode.FAULTY_NODE, step=0)
    patient = FailurePolicy(max_failures=100)
    verdict = judge(fault, status=records(0, 0, reason=Reason.FAULTY_NODE), policy=patient)
    assert (verdict.effect, verdict.reason) == ("Count", Reason.FAULTY_NODE)
    assert "a node with two faults is avoided" in verdict.message
    others = (exit_of(ExitCode.LOST_PEER, "r-0-0", rank=0), exit_of(ExitCode.FAULTY_NODE, "r-1-0", rank=1))
    assert judge(*others).ending.pod_name == "r-1-0", "its peers left because of it"


def avoiding(*nodes: str, since: float = 0) -> QLoRAFinetuneStatus:
    until = {node: ago(since) + timedelta(seconds=HOUR) for node in nodes}
    return QLoRAFinetuneStatus(avoided_nodes=list(nodes), avoided_until=until)


def test_a_further_fault_starts_an_avoided_nodes_time_anew() -> None:
    status = failure.record(judge(exit_of(1)), avoiding("node-a", "node-b", since=600), POLICY, NOW, HOUR)
    assert status.avoided_nodes == ["node-b", "node-a"]
    assert status.avoided_until == {"node-a": ago(-HOUR), "node-b": ago(600 - HOUR)}


def test_a_disruption_is_no_fault_of_its_node() -> None:
    evicted = judge(Ending("r-0-0", "node-a", Reason.EVICTED))
    before = avoiding("node-a", since=600)
    assert failure.record(evicted, before, POLICY, NOW, HOUR).avoided_until == before.avoided_until
    forgiven = QLoRAFinetuneStatus(failures=[FailureRecord(time=ago(9e4), reason="X", node_name="node-a")] * 2)
    assert failure.record(evicted, forgiven, POLICY, NOW, HOUR).avoided_nodes == []


def test_a_node_is_forgiven_in_time() -> None:
    status = avoiding("node-a", since=600)
    assert failure.forgive(status, ago(1), HOUR) == status
    assert failure.forgive(status, ago(600 - HOUR), HOUR).avoided_nodes == []
    assert failure.forgive(status, ago(600 - HOUR), HOUR).avoided_until == {}


def test_an_avoided_node_of_an_older_operator_gets_a_whole_time() -> None:
    status = failure.forgive(QLoRAFinetuneStatus(avoided_nodes=["node-a"]), NOW, HOUR)
    assert status.avoided_until == {"node-a": ago(-HOUR)}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([1, 76, 79, None]), st.floats(0, 5000))))
def test_whom_we_avoid_has_a_time_and_after_it_nobody(history: list[tuple[str, int | None, float]]) -> None:
    status, now = QLoRAFinetuneStatus(), NOW
    for node, code, seconds in history:
        now += timedelta(seconds=seconds)
        status = failure.forgive(status, now, HOUR)
        ending = Ending("r", node, Reason.SILENT) if code is None else exits.of_termination("r", node, ended(code))
        verdict = failure.judge((ending,), status, POLICY, now)
        assert verdict is not None
        status = failure.record(verdict, status, POLICY, now, HOUR) if verdict.effect in ("Count", "Free") else status
        assert status.avoided_nodes == list(status.avoided_until)
        assert all(until > now for until in status.avoided_until.values())
    assert failure.forgive(status, now + timedelta(seconds=HOUR), HOUR).avoided_nodes == []


def test_advice_fits_what_the_spec_points_to_as_well_as_the_spec() -> None:
    verdict = judge(Ending("r-0-0", "n", Reason.INVALID_SPEC, 64, "s3://data has no usable files"))
    assert verdict.message == ("s3://data has no usable files. Once that is corrected, create a new QLoRAFinetune.")


def test_containers_ends() -> None:
    killed = exits.of_container(pod(0, exit=Exit(137, "OOMKilled")), step=4)
    assert (killed.reason, killed.exit_code, killed.step) == (Reason.OUT_OF_MEMORY, ExitCode.OUT_OF_MEMORY, 4)
    outside = exits.of_container(pod(0, exit=Exit(137, "Error")), step=4)
    assert (outside.reason, outside.exit_code) == (Reason.POD_LOST, None)
    with_its_node = exits.of_container(pod(0, exit=Exit(255, "Unknown", message="some log")), step=4)
    assert (with_its_node.reason, with_its_node.exit_code) == (Reason.POD_LOST, None)
    told = Termination(exit_code=65, reason="InvalidDataset", message="train.jsonl:3: not JSON")
    assert exits.of_container(pod(0, exit=Exit(65, "Error", told)), 4).message == "train.jsonl:3: not JSON"
    crash = exits.of_container(pod(0, exit=Exit(1, "Error", message="Traceback")), step=4)
    assert (crash.reason, crash.log_tail) == (Reason.WORKER_FAILED, "Traceback")
