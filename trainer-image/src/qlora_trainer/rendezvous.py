"""Rendezvous for torch elastic whose authority is the coordinator (backend `qlora`).

Rules: `next_rendezvous` reports READY and waits for a newer generation that contains this pod; `num_nodes_waiting` is 1
once a newer one is being prepared and the workers stand at a step boundary (or cannot any more). Every generation has a
TCPStore of its own on its first member: nobody hosts anything for longer than a generation. Whatever fails on the way
in (a member that died meanwhile) leads back to waiting; nothing blocks longer than STORE_SECONDS. All others wait for
who cannot reach the store: it says so soon, and is no candidate for a while when that happens again and again.
"""

import logging
import os
import socket
import time
from datetime import timedelta

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousGracefulExitError, RendezvousStoreInfo

from qlora_api.names import Reason
from qlora_api.run import STORE_PORT, AgentState, ExitCode, Termination
from qlora_trainer import faults
from qlora_trainer.board import Board

BACKEND = "qlora"
STORE_SECONDS = 20.0
REACH_SECONDS = 5.0  # for the store's host to listen: it stood with all others, so it has only to hear of it
ASIDE_SECONDS = 10.0  # out of the others' way after the second time in a row; twice as long after each further one
_LONGEST_ASIDE_SECONDS = 120.0
_PORTS = 100

log = logging.getLogger(__name__)


def create_handler(params: RendezvousParameters) -> RendezvousHandler:
    """For torch elastic's registry: a pod that runs plain torchrun reports and joins as one with our agent does."""
    from qlora_trainer.pod_agent import Agent, AgentEnv

    agent = Agent(AgentEnv.of_environment())
    agent.start_threads()
    return QloraRendezvous(agent.board, params.run_id, agent.env.num_workers)


class QloraRendezvous(RendezvousHandler):
    """One per agent; `board` is shared with the thread that talks to the coordinator."""

    def __init__(self, board: Board, run_id: str, num_workers: int) -> None:
        self._board, self._run_id, self._num_workers = board, run_id, num_workers
        self._store: TCPStore | None = None
        self._rehearsed = False

    @property
    def use_agent_store(self) -> bool:
        """Workers meet at this generation's store: it outlives them, and no further port is needed."""
        return True

    def get_backend(self) -> str:
        return BACKEND

    def get_run_id(self) -> str:
        return self._run_id

    def next_rendezvous(self) -> RendezvousInfo:
        """Stand until a generation with this pod is published and its store answers. Generation 0 is the pod's own."""
        self._store = None  # the store of the generation before goes with its last reference
        if self._board.assigns and not self._board.joined and not self._rehearsed:
            self._rehearsed = True
            self._store = TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
            return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo("127.0.0.1", self._store.port))
        started, num_failures = time.monotonic(), 0
        while True:
            self._board.set_state(AgentState.READY)
            faults.reach("rendezvous")
            found = None
            while found is None:
                if self._board.stopping:
                    raise RendezvousGracefulExitError("this pod was told to stop")
                found = self._board.await_generation(timeout=1.0)
            generation, rank, view = found
            self._board.join(generation)
            host, port = view.members[0].address, STORE_PORT + generation % _PORTS
            store = self._open_store(host, port, rank, len(view.members))
            if store is not None:
                break
            log.warning("generation %d did not come together: back into the rendezvous", generation)
            if not self._board.superseded():
                num_failures += 1
                what = f"node {rank} of generation {generation} finds no store at {host}:{port}"
                self._stand_aside(num_failures, f"{what}: the run's pods must reach each other at all ports")
        self._store = store
        self._board.set_metric("rendezvous_seconds", time.monotonic() - started)
        log.info("generation %d: node %d of %d, store %s:%d", generation, rank, len(view.members), host, port)
        return RendezvousInfo(store, rank, len(view.members), RendezvousStoreInfo(host, port))

    def num_nodes_waiting(self) -> int:
        return int(self._board.may_end_workers(self._num_workers))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Nothing to close: the coordinator decides when a run is over."""

    def shutdown(self) -> bool:
        self._store = None
        return True

    def _stand_aside(self, num_failures: int, message: str) -> None:
        """Tell why the others wait; after the first failure in a row, let them begin without this pod."""
        lost = Termination(exit_code=ExitCode.LOST_PEER, reason=Reason.LOST_PEER, message=message)
        if num_failures == 1:
            self._board.set_state(AgentState.READY, lost)
            return
        self._board.set_state(AgentState.WARMING, lost)
        deadline = time.monotonic() + min(_LONGEST_ASIDE_SECONDS, ASIDE_SECONDS * 2.0 ** (num_failures - 2))
        while time.monotonic() < deadline and not self._board.stopping:
            time.sleep(0.1)

    def _open_store(self, host: str, port: int, rank: int, num_nodes: int) -> TCPStore | None:
        """The generation's store, or None when it is superseded or its host does not answer in time."""
        start, patience = time.monotonic(), STORE_SECONDS if rank == 0 else REACH_SECONDS
        while time.monotonic() < start + patience and not self._board.superseded():
            try:
                if rank == 0:
                    return _host_store(host, port, num_nodes)
                _require_listener(host, port)
                patience = STORE_SECONDS  # torch looks the peer's name up: once in a process, however long that takes
                return TCPStore(
                    host, port, num_nodes, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False
                )
            except (OSError, DistError) as error:
                log.debug("store %s:%d: %s", host, port, error)
                time.sleep(0.05)
        return None


def _host_store(host: str, port: int, num_nodes: int) -> TCPStore:
    """A store that listens on this pod's own address alone; OSError while the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of 100 generations ago linger
        listener.bind((host, port))
        listener.listen(1024)
        fd = os.dup(listener.fileno())  # the store closes it
    return TCPStore(
        host,
        port,
        num_nodes,
        is_master=True,
        timeout=timedelta(seconds=STORE_SECONDS),
        wait_for_workers=False,
        master_listen_fd=fd,
    )


def _require_listener(host: str, port: int) -> None:
    """OSError unless somebody listens; TCPStore itself would block for its whole timeout."""
    with socket.create_connection((host, port), timeout=1.0):
        pass
