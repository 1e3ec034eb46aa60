"""What the agent's board tells the coordinator and the workers."""

from pathlib import Path

import pytest

from qlora_api.memory import Plan
from qlora_api.run import AgentState, Command, ExitCode, Membership, Report, Termination
from qlora_api.status import Member, Progress
from qlora_trainer import board as board_module
from qlora_trainer.board import Board, killed
from qlora_trainer.control import Control, Phase, WorkerState, read_control


def member(uid: str) -> Member:
    return Member(pod_uid=uid, pod_name=f"pod-{uid}", address=f"10.0.0.{uid}")


def view(generation: int, *uids: str, prepare: int | None = None, command: Command = Command.RUN) -> Membership:
    members = [member(uid) for uid in uids]
    return Membership(generation=generation, members=members, prepare=prepare or generation, command=command)


def worker(generation: int, step: int, phase: Phase = Phase.TRAINING) -> WorkerState:
    return WorkerState(generation=generation, phase=phase, progress=Progress(step=step), snapshot_step=step)


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path, "10.0.0.1", "1")


@pytest.fixture
def joined(board: Board) -> Board:
    """A member of generation 1 whose worker has done two steps."""
    board.hear(view(0))
    board.set_state(AgentState.READY)
    board.hear(view(1, "1", "2"))
    assert board.await_generation(0) is not None
    board.join(1)
    board.watch(0, worker(1, 1))
    board.watch(0, worker(1, 2))
    return board


def test_a_generation_that_was_there_before_us_is_not_ours(board: Board) -> None:
    """The container restarted: its pod is in the old list, but nobody waits for it in that generation."""
    board.hear(view(5, "1", "2"))
    assert board.await_generation(0) is None
    board.hear(view(6, "2"))
    assert board.await_generation(0) is None
    board.hear(view(7, "2", "1"))
    found = board.await_generation(0)
    assert found is not None and found[:2] == (7, 1)


def test_an_older_answer_changes_nothing(joined: Board) -> None:
    joined.hear(view(2, "1"))
    joined.hear(view(1, "1", "2"))
    assert joined.view.generation == 2


def test_workers_are_told_what_the_coordinator_wants(joined: Board, tmp_path: Path) -> None:
    assert read_control(tmp_path) == Control(generation=1, prepare=1)
    joined.hear(view(1, "1", "2", prepare=2))
    assert read_control(tmp_path) == Control(generation=1, prepare=2)
    joined.hear(view(2, "1"))
    assert read_control(tmp_path).generation == 1, "these workers stay of the generation that they were started in"
    joined.hear(view(2, "1", command=Command.STOP))
    assert read_control(tmp_path).command == Command.STOP


def test_workers_that_train_are_let_alone(joined: Board) -> None:
    assert not joined.may_end_workers(1)
    assert not joined.superseded()


def test_workers_are_ended_when_they_are_parked(joined: Board) -> None:
    joined.hear(view(1, "1", "2", prepare=2))
    assert joined.superseded()
    assert not joined.may_end_workers(1)
    joined.watch(0, worker(1, 3, Phase.PARKED))
    assert not joined.may_end_workers(2), "one of two"
    assert joined.may_end_workers(1)


def test_workers_that_start_have_nothing_to_lose(joined: Board) -> None:
    joined.watch(0, worker(1, 0, Phase.STARTING))
    joined.hear(view(1, "1", "2", prepare=2))
    assert joined.may_end_workers(1)


def test_a_rehearsal_is_let_alone_until_the_pod_goes(board: Board) -> None:
    board.hear(view(3, "2"))
    board.watch(0, worker(0, 0, Phase.STARTING))
    assert not board.may_end_workers(1)
    board.request_leave()
    assert board.may_end_workers(1), "there may be a snapshot to save in the time that is left"


def test_workers_that_wait_for_a_lost_peer_are_ended_after_a_while(
    joined: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined.hear(view(1, "1", "2", prepare=2))
    assert not joined.may_end_workers(1)
    monkeypatch.setattr(board_module, "PARK_FLOOR_SECONDS", 0.0)
    monkeypatch.setattr(board_module, "PARK_STEPS", 0.0)
    assert joined.may_end_workers(1)


def wait_for_park(board: Board, monkeypatch: pytest.MonkeyPatch) -> float:
    """Seconds after which the board gives its workers up, found by turning the clock."""
    now = board_module.time.monotonic()
    monkeypatch.setattr(board_module.time, "monotonic", lambda: now)
    assert not board.may_end_workers(1)
    start = now
    while not board.may_end_workers(1):
        now += 0.25
        assert now < start + 1000
    return now - start


def step_of(board: Board, seconds: float, monkeypatch: pytest.MonkeyPatch, generation: int, step: int) -> None:
    """The worker of `generation` needs `seconds` for `step`."""
    now = board_module.time.monotonic()
    monkeypatch.setattr(board_module.time, "monotonic", lambda: now)
    board.watch(0, worker(generation, step - 1))
    now += seconds
    board.watch(0, worker(generation, step))


@pytest.mark.parametrize(
    ("uids", "patience"), [(("1", "2"), 20), (("1",), 40), (("1", "2", "3"), 20)], ids=["same", "fewer", "more"]
)
def test_patience_outlives_a_generation(
    board: Board, monkeypatch: pytest.MonkeyPatch, uids: tuple[str, ...], patience: float
) -> None:
    """A second newcomer right after the first: healthy workers whose first step is under way are let finish it."""
    board.hear(view(0))
    board.hear(view(1, "1", "2"))
    board.join(1)
    step_of(board, 10, monkeypatch, generation=1, step=5)
    board.hear(view(2, *uids))
    board.join(2)
    board.watch(0, worker(2, 0, Phase.STARTING))
    board.watch(0, worker(2, 5))
    board.hear(view(2, *uids, prepare=3))
    assert wait_for_park(board, monkeypatch) == pytest.approx(patience, abs=0.3)


def test_before_any_step_was_timed_a_worker_gets_as_long_as_a_new_one_would_take(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    board.hear(view(0))
    board.hear(view(1, "1", "2"))
    board.join(1)
    board.watch(0, worker(1, 0, Phase.STARTING))
    board.watch(0, worker(1, 100))  # restored: these were no steps
    board.hear(view(1, "1", "2", prepare=2))
    assert wait_for_park(board, monkeypatch) == pytest.approx(board_module.PARK_UNTIMED_SECONDS, abs=0.3)


def test_of_workers_that_lost_a_peer_all_park_or_none_stays(joined: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    joined.watch(0, worker(1, 3, Phase.PARKED))
    joined.watch(1, worker(1, 3))
    assert not joined.may_end_workers(2), "the other one may follow in a moment"
    monkeypatch.setattr(board_module, "PARK_FLOOR_SECONDS", 0.0)
    monkeypatch.setattr(board_module, "PARK_STEPS", 0.0)
    assert joined.may_end_workers(2), "it hangs"


def test_a_worker_that_has_finished_is_not_waited_for(joined: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_module, "PARK_FLOOR_SECONDS", 0.0)
    joined.watch(0, worker(1, 3, Phase.FINISHED))
    joined.watch(1, worker(1, 3))
    assert not joined.may_end_workers(2)
    joined.watch(1, worker(1, 3, Phase.PARKED))
    assert joined.may_end_workers(2)


def test_collectives_that_hang_are_broken_off_before_their_worker_is_ended(
    joined: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined.assign_places(can_abandon=True)
    joined.hear(view(1, "1", "2", prepare=2))
    assert not joined.may_end_workers(1)
    assert not read_control(tmp_path).abandon, "a step boundary may come"
    monkeypatch.setattr(board_module, "PARK_FLOOR_SECONDS", 0.0)
    monkeypatch.setattr(board_module, "PARK_STEPS", 0.0)
    assert not joined.may_end_workers(1)
    assert read_control(tmp_path) == Control(generation=1, prepare=2, abandon=True, assigns=True)
    joined.assign_places(can_abandon=False)  # its time is over
    assert joined.may_end_workers(1)
    joined.join(2)
    assert not read_control(tmp_path).abandon


def test_a_restart_lasts_from_the_first_word_of_it_to_the_first_new_step(
    joined: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(board_module.time, "monotonic", lambda: now[0])

    def at(seconds: float, step: int, generation: int, first: bool = False) -> dict[str, float]:
        now[0] = seconds
        told = worker(generation, step)
        joined.watch(0, told if first else told.model_copy(update={"metrics": {"step_seconds": 0.1}}))
        return joined.report(0).metrics

    joined.hear(view(1, "1", "2", prepare=2))
    joined.hear(view(1, "1", "2"))
    now[0] = 103.0
    joined.hear(view(1, "1", "2", prepare=2))
    assert "restart_seconds" not in at(103.1, 3, 1), "a step of the old generation"
    joined.set_state(AgentState.READY)
    joined.hear(view(2, "1"))
    joined.join(2)
    joined.set_state(AgentState.FAILED)  # its peer was gone before it came together
    joined.hear(view(3, "1"))
    joined.join(3)
    assert "restart_seconds" not in at(106.0, 3, 3, first=True), "restored"
    assert at(107.0, 4, 3)["restart_seconds"] == 4.0
    assert at(110.0, 5, 3)["restart_seconds"] == 4.0
    assert read_control(tmp_path).metrics == {"restart_seconds": 4.0}, "for the run's report"


def test_the_memory_plan_travels_with_the_report(joined: Board) -> None:
    made = Plan(
        sharding="FULL_SHARD",
        micro_batch_size=4,
        num_layers=32,
        recomputed_layers=3,
        cpu_offload=False,
        host_embeddings=True,
        gpu={"base": 5 << 30},
        host={"worker": 1 << 30},
        gpu_limit=73 << 30,
    )
    joined.watch(0, worker(1, 3).model_copy(update={"plan": made}))
    assert Report.model_validate_json(joined.report(0).model_dump_json(by_alias=True)).plan == made


def test_a_first_start_is_no_restart(joined: Board) -> None:
    joined.watch(0, worker(1, 3).model_copy(update={"metrics": {"step_seconds": 0.1}}))
    assert "restart_seconds" not in joined.report(0).metrics


def test_a_worker_of_an_older_generation_is_not_looked_at(joined: Board) -> None:
    joined.join(2)
    joined.watch(0, worker(1, 9))
    assert joined.worker is None and joined.report(0).snapshot_step == 2, "what the memory tier holds is still known"


def test_the_reason_is_told_until_the_next_generation(joined: Board) -> None:
    lost = Termination(exit_code=ExitCode.LOST_PEER, reason="LostPeer")
    joined.set_state(AgentState.FAILED, lost)
    joined.set_state(AgentState.READY)
    report = joined.report(0)
    assert (report.state, report.generation, report.termination) == (AgentState.READY, 1, lost)
    joined.join(2)
    assert joined.report(0).termination is None


def test_a_pod_works_as_long_as_its_slowest_worker(joined: Board) -> None:
    for local_rank, seconds in ((0, 0.2), (1, 0.5), (2, 0.3)):
        state = worker(1, 3).model_copy(update={"metrics": {"step_work_seconds": seconds, "step_seconds": 0.6}})
        joined.watch(local_rank, state)
    assert joined.report(0).metrics == {"step_work_seconds": 0.5, "step_seconds": 0.6}
    joined.join(2)
    assert joined.report(0).metrics == {}, "the workers of a new generation have not measured yet"


def test_who_was_told_to_leave_joins_nothing_more(joined: Board, tmp_path: Path) -> None:
    joined.request_leave()
    assert joined.report(0).state == AgentState.LEAVING
    joined.hear(view(2, "1"))
    assert joined.await_generation(0) is None
    joined.force_park()
    assert read_control(tmp_path).prepare == 2


@pytest.mark.parametrize(
    ("exit_code", "oom", "code"), [(-9, False, 137), (-9, True, ExitCode.OUT_OF_MEMORY), (3, False, 3)]
)
def test_ends_without_a_word(exit_code: int, oom: bool, code: int) -> None:
    assert killed(exit_code, oom)[0] == code
