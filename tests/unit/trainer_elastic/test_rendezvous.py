"""The way into a generation: a store that can't be reached, one that comes late, a generation that is superseded."""

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from tests import waiting
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import RendezvousInfo
from torch.distributed.elastic.rendezvous.api import RendezvousGracefulExitError

from qlora_api.names import Reason
from qlora_api.run import STORE_PORT, AgentState, Command, Membership, Termination
from qlora_api.status import Member
from qlora_trainer import rendezvous
from qlora_trainer.board import Board
from qlora_trainer.rendezvous import QloraRendezvous

HOST, OWN = "127.83.7.1", "127.83.7.2"  # loopback, nobody else's
Told = tuple[AgentState, str | None]

wait_for = partial(waiting.wait_for, seconds=15)


class Pod(threading.Thread):
    """A pod that goes through the rendezvous once; `told` is what it reported."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(daemon=True)
        self.board = Board(run_dir, OWN, "own")
        self.told: list[Told] = []
        self.info: RendezvousInfo | None = None
        self._handler = QloraRendezvous(self.board, "r", 1)
        self._set_state = self.board.set_state
        self.board.set_state = self._note  # type: ignore[method-assign]

    def run(self) -> None:
        with suppress(RendezvousGracefulExitError):
            self.info = self._handler.next_rendezvous()

    def hear(self, generation: int, *uids: str, prepare: int | None = None) -> None:
        members = [Member(pod_uid=uid, pod_name=uid, address=OWN if uid == "own" else HOST) for uid in uids]
        self.board.hear(Membership(generation=generation, members=members, prepare=prepare or generation))

    def _note(self, state: AgentState, termination: Termination | None = None) -> None:
        self._set_state(state, termination)
        self.told.append((state, termination.reason if termination else None))


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    made = Pod(tmp_path)
    made.hear(0)
    made.start()
    wait_for(lambda: bool(made.told))
    yield made
    made.board.hear(Membership(generation=99, prepare=99, command=Command.STOP))
    made.join(20)


def tells(pod: Pod, told: list[Told]) -> bool:
    return len(pod.told) >= len(told)


def host_store(generation: int) -> TCPStore:
    return rendezvous._host_store(HOST, STORE_PORT + generation, 2)


def test_who_cannot_reach_the_store_says_so_and_then_stands_aside(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "ASIDE_SECONDS", 0.3)
    monkeypatch.setattr(rendezvous, "REACH_SECONDS", 0.3)
    told: list[Told] = [(AgentState.READY, None)]
    for generation, state in ((1, AgentState.READY), (2, AgentState.WARMING), (3, AgentState.WARMING)):
        pod.hear(generation, "host", "own")
        told += [(state, Reason.LOST_PEER), (AgentState.READY, None)]
        wait_for(partial(tells, pod, told))
        assert pod.told == told
    assert pod.board.report(0).termination is not None, "told until it joins"
    pod.hear(4, "own")
    wait_for(lambda: pod.info is not None)
    assert pod.board.report(0).termination is None


def test_a_store_that_comes_late_is_waited_for(pod: Pod) -> None:
    pod.hear(1, "host", "own")
    wait_for(lambda: pod.board.joined == 1)
    time.sleep(0.5)  # its host is slow
    store = host_store(1)
    wait_for(lambda: pod.info is not None)
    assert pod.told == [(AgentState.READY, None)]
    store.set("key", "value")
    assert pod.info is not None and pod.info.store.get("key") == b"value"


def test_a_host_that_is_slow_to_answer_is_not_given_up(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a name server that is away: torch looks the peer's name up for longer than its own timeout."""
    attempts = []

    def slow(*args: object, timeout: timedelta, **options: object) -> TCPStore:
        attempts.append(timeout)
        if len(attempts) == 1:
            time.sleep(2 * rendezvous.REACH_SECONDS)
            raise TimeoutError("the name server is away")
        return TCPStore(*args, timeout=timeout, **options)

    store = host_store(1)
    monkeypatch.setattr(rendezvous, "REACH_SECONDS", 0.2)
    monkeypatch.setattr(rendezvous, "TCPStore", slow)
    pod.hear(1, "host", "own")
    wait_for(lambda: pod.info is not None)
    assert len(attempts) == 2 and pod.told == [(AgentState.READY, None)]
    assert store.num_keys() >= 0


def test_a_generation_that_is_superseded_is_nobodys_failure(pod: Pod) -> None:
    pod.hear(7, "host", "own")
    wait_for(lambda: pod.board.joined == 7)
    pod.hear(7, "host", "own", prepare=8)
    wait_for(lambda: len(pod.told) > 1)
    assert pod.told == [(AgentState.READY, None)] * 2
