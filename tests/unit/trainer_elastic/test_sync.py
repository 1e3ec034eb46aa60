"""The line to the coordinator: held calls, urgent ones beside them, and a coordinator that goes away."""

import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests import waiting

from qlora_api.run import AgentState, Membership
from qlora_trainer import sync as sync_module
from qlora_trainer.board import Board
from qlora_trainer.sync import SyncThread

wait_for = partial(waiting.wait_for, seconds=20)


class Server:
    """Answers with `membership`, held calls when it changes or their time is over."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []
        self.membership, self.status, self.changed = Membership(), 200, threading.Condition()
        self.held_ports: set[int] = set()  # the agent's, of its held calls
        self.num_to_break, self.silent = 0, False  # urgent calls to hang up on; whether they get no answer
        self.closed = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_port}/sync"

    def close(self) -> None:
        self.closed.set()
        self._http.shutdown()
        self._http.server_close()

    def publish(self, membership: Membership) -> None:
        with self.changed:
            self.membership = membership
            self.changed.notify_all()

    def _answer(self, report: dict[str, Any]) -> bytes:
        deadline = time.monotonic() + report["waitSeconds"]
        with self.changed:
            self.reports.append(report)
            while self.membership.generation <= report["knownGeneration"]:
                if (left := deadline - time.monotonic()) <= 0:
                    break
                self.changed.wait(left)
            return self.membership.model_dump_json(by_alias=True).encode()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server.tokens.append(self.headers.get("Authorization"))
                report = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if report["waitSeconds"]:
                    server.held_ports.add(self.client_address[1])
                elif server.silent or server.num_to_break:
                    if server.silent:
                        server.closed.wait()
                    else:
                        server.num_to_break -= 1
                    self.close_connection = True
                    return
                body = server._answer(report)
                self.send_response(server.status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def board(server: Server, tmp_path: Path) -> Iterator[Board]:
    (tmp_path / "token").write_text("first\n")
    made = Board(tmp_path, "10.0.0.1", "1")
    sync = SyncThread(server.url, tmp_path / "token", tmp_path / "ca", made.report, made.hear, made.urgent_read)
    sync.start()
    yield made
    sync.end(0)


def test_news_comes_through_the_held_call(server: Server, board: Board) -> None:
    wait_for(lambda: bool(server.reports))
    server.publish(Membership(generation=3, prepare=3))
    wait_for(lambda: board.view.generation == 3)


def test_an_urgent_report_does_not_wait_for_the_held_call(server: Server, board: Board) -> None:
    wait_for(lambda: bool(server.reports))
    board.set_state(AgentState.READY)
    wait_for(lambda: any(report["state"] == "Ready" for report in server.reports))
    first = next(report for report in server.reports if report["state"] == "Ready")
    assert first["waitSeconds"] == 0


def test_an_urgent_call_that_breaks_is_made_again_and_breaks_no_held_one(server: Server, board: Board) -> None:
    """The coordinator takes a held call that breaks for the loss of its pod."""
    wait_for(lambda: bool(server.reports))
    server.num_to_break = 1
    board.set_state(AgentState.READY)
    wait_for(lambda: any((report["state"], report["waitSeconds"]) == ("Ready", 0) for report in server.reports))
    count = len(server.reports)
    wait_for(lambda: len(server.reports) > count + 1)
    assert len(server.held_ports) == 1


def test_heartbeats_go_on_while_an_urgent_call_has_no_answer(
    server: Server, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for(lambda: bool(server.reports))
    monkeypatch.setattr(sync_module, "_ANSWER_SECONDS", 3600.0)
    server.silent = True
    board.set_state(AgentState.READY)
    wait_for(lambda: sum(report["state"] == "Ready" for report in server.reports) > 1)
    server.publish(Membership(generation=3, prepare=3))
    wait_for(lambda: board.view.generation == 3)


def test_the_end_waits_until_the_newest_state_has_its_answer(server: Server, tmp_path: Path) -> None:
    board = Board(tmp_path, "10.0.0.1", "1")
    sync = SyncThread(server.url, tmp_path / "token", tmp_path / "ca", board.report, board.hear, board.urgent_read)
    sync.start()
    wait_for(lambda: bool(server.reports))
    with board.changed:
        board.state = AgentState.FINISHED  # nobody hurries
    assert sync.end(20)
    assert server.reports[-1]["state"] == "Finished"


def test_the_token_is_read_anew_for_every_call(server: Server, board: Board, tmp_path: Path) -> None:
    wait_for(lambda: "Bearer first" in server.tokens)
    (tmp_path / "token").write_text("second")
    wait_for(lambda: "Bearer second" in server.tokens)


def test_a_refusal_is_tried_again(server: Server, board: Board) -> None:
    server.status = 503
    wait_for(lambda: len(server.reports) > 2)
    assert board.view.generation == 0
    server.status = 200
    server.publish(Membership(generation=1, prepare=1))
    wait_for(lambda: board.view.generation == 1)


def test_text_of_any_language_is_reported(server: Server, board: Board) -> None:
    from qlora_api.run import Termination

    board.set_state(AgentState.FAILED, Termination(exit_code=1, reason="X", message="gloo 🏖️"))
    wait_for(lambda: any("termination" in report and report["termination"] for report in server.reports))
    told = next(report["termination"]["message"] for report in server.reports if report.get("termination"))
    assert told == "gloo 🏖️"
