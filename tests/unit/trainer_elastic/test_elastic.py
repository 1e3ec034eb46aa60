"""What becomes of a pod's workers between two generations, which of several ends is told, how a pod goes."""

import multiprocessing
import os
import sys
import time
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState

from qlora_api.run import AgentState, ExitCode, Termination
from qlora_trainer import control, elastic, pod_agent, workers
from qlora_trainer.board import Board
from qlora_trainer.control import read_control, read_termination, write_termination, write_worker_state
from qlora_trainer.elastic import NodeAgent
from qlora_trainer.rendezvous import QloraRendezvous
from qlora_trainer.snapshot import SnapshotSlots


def make_agent(run_dir: Path, num_workers: int = 1) -> NodeAgent:
    board = Board(run_dir, "10.0.0.1", "1")
    pump = SimpleNamespace(tail=lambda: "the last lines", clear=lambda: None)
    handler = QloraRendezvous(board, "r", num_workers)
    agent = NodeAgent(board, handler, run_dir, num_workers, [pump] * num_workers)  # type: ignore[list-item]
    agent._pcontext = SimpleNamespace(pids=lambda: {rank: 100 + rank for rank in range(num_workers)})  # type: ignore[assignment]
    return agent


@pytest.mark.parametrize(("stands", "given"), [("1", True), ("0", False)])
def test_workers_stand_only_where_the_agent_gives_out_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stands: str, given: bool
) -> None:
    monkeypatch.setenv(elastic.ENV_STAND, stands)
    agent = make_agent(tmp_path)
    ended: list[Any] = []
    monkeypatch.setattr(agent, "_all_parked", lambda: True)
    monkeypatch.setattr(agent, "_end_workers", ended.append)
    agent._stop_workers(agent._worker_group)
    assert read_control(tmp_path).assigns == agent._standing == given
    assert bool(ended) != given


@pytest.mark.parametrize(("generations", "killed"), [((5, 5), 0), ((5, 4), 2), ((4, None), 2)])
def test_workers_that_do_not_take_their_places_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generations: tuple[int | None, ...], killed: int
) -> None:
    agent = make_agent(tmp_path, num_workers=2)
    agent._board.join(5)
    for rank, generation in enumerate(generations):
        if generation is not None:
            write_worker_state(tmp_path, rank, control.WorkerState(generation=generation))
    ended: list[Any] = []
    monkeypatch.setattr(elastic, "_kill", ended.extend)
    agent._assigned_at = time.monotonic()
    agent._await_takers([1, 2])
    assert not ended, "there is time"
    monkeypatch.setattr(elastic, "TAKE_SECONDS", 0.0)
    agent._assigned_at = agent._assigned_at and agent._assigned_at - 1
    if agent._assigned_at is not None:
        agent._await_takers([1, 2])
    assert len(ended) == killed
    told = [read_termination(tmp_path, rank) for rank in (0, 1)]
    assert [t.reason if t else None for t in told] == ["LostPeer" if killed else None] * 2


def process(pid: int, exit_code: int | None) -> Any:
    return SimpleNamespace(pid=pid, exitcode=exit_code, kill=lambda: None, join=lambda seconds: None)


@pytest.mark.parametrize(
    ("said", "exit_code", "reason"),
    [
        ({0: ExitCode.LOST_PEER, 1: ExitCode.CORRUPT_BASE}, 76, "CorruptBase"),
        ({0: ExitCode.LOST_PEER}, -9, "WorkerFailed"),
        ({1: ExitCode.LOST_PEER}, 79, "LostPeer"),
    ],
    ids=["in its own words", "killed", "innocent, too"],
)
def test_the_worker_that_ended_first_is_to_blame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: dict[int, ExitCode], exit_code: int, reason: str
) -> None:
    """Its sibling, parked or in a collective, is ended by the agent, and torch tells of that one only."""
    agent = make_agent(tmp_path, num_workers=2)
    agent._board.join(1)
    reasons = {ExitCode.LOST_PEER: "LostPeer", ExitCode.CORRUPT_BASE: "CorruptBase"}
    for rank, code in said.items():
        write_termination(tmp_path, rank, Termination(exit_code=code, reason=reasons[code]))
    both = [process(100, None), process(101, None)]
    left = [both[0]]
    told = RunResult(WorkerState.FAILED, failures={0: SimpleNamespace(local_rank=0, exitcode=-9)})  # type: ignore[dict-item]
    results = iter([RunResult(WorkerState.HEALTHY), told])
    monkeypatch.setattr(elastic.LocalElasticAgent, "_monitor_workers", lambda *_: next(results))
    for alive in (both, left):
        monkeypatch.setattr(multiprocessing, "active_children", lambda alive=alive: alive)
        if alive is left:
            both[1].exitcode = exit_code
        agent._monitor_workers(agent._worker_group)
    termination = agent._board.termination
    assert termination is not None and termination.reason == reason


def test_a_rehearsal_that_fails_is_not_told(tmp_path: Path) -> None:
    """Torch elastic reports READY a moment later: whether the operator heard of the failure would be chance."""
    agent = make_agent(tmp_path)
    write_termination(tmp_path, 0, Termination(exit_code=ExitCode.INTERNAL, reason="RuntimeError"))
    result = RunResult(WorkerState.FAILED, failures={0: SimpleNamespace(local_rank=0, exitcode=70)})  # type: ignore[dict-item]
    agent._explain(result)
    assert (agent._board.state, agent._board.termination) == (AgentState.WARMING, None)
    agent._board.join(1)
    agent._explain(result)
    assert (agent._board.state, agent._board.termination) == (AgentState.FAILED, read_termination(tmp_path, 0))


@pytest.fixture
def pod(tmp_path: Path) -> pod_agent.Agent:
    """An agent that warms up; none of its threads runs."""
    paths = {name: tmp_path / name for name in ("token", "ca", "termination_path")}
    env = pod_agent.AgentEnv("http://none", tmp_path, "10.0.0.1", "1", num_workers=1, **paths)
    return pod_agent.Agent(env)


def test_a_pod_that_warms_up_leaves_at_once_unless_it_has_snapshots(
    pod: pod_agent.Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has some when its agent crashed and was started again."""
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as end:
        pod._on_sigterm()
    assert end.value.code == ExitCode.STOPPED and not pod.board.leaving
    slots = SnapshotSlots(tmp_path)
    slots.write(7, 1, {"t": torch.ones(3)}, {})
    slots.wait()
    pod._on_sigterm()
    assert pod.board.leaving


def test_a_warm_up_that_is_ended_has_not_failed(pod: pod_agent.Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    signals: list[str] = []
    child = SimpleNamespace(
        start=lambda: None, is_alive=lambda: True, exitcode=None, kill=lambda: signals.append("kill")
    )
    child.join = lambda seconds: pod.board.request_leave()
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: SimpleNamespace(Process=lambda target: child))
    pod._warm_up()
    assert signals == ["kill"] and pod.board.termination is None


def test_output_is_kept_whenever_it_is_cleared(pod: pod_agent.Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """`clear` comes from another thread: here between any two lines of the pump's."""
    pump = pod.pumps[0]

    def feed(trace: Any) -> None:
        chunks = iter([b"a" * 5000, b"b" * 5000, b"c" * 20_000 + b"end", b""])
        monkeypatch.setattr(workers, "os", SimpleNamespace(read=lambda *_: next(chunks), write=lambda *_: None))
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            pump.run()
        finally:
            sys.settrace(before)

    def clear(frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_code is workers.OutputPump.run.__code__ and event == "line":
            pump.clear()
        return clear

    feed(clear)
    feed(None)
    assert pump.tail() == "c" * 5997 + "end"
