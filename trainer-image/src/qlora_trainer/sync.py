"""The agent's line to the coordinator: heartbeat, report and membership in one held call.

Rules: one thread; a call is held open HEARTBEAT_SECONDS and renewed at once. What cannot wait goes over a second
connection while the first is held, so a report never waits for an answer and reports never overtake each other by more
than the one in flight. The token is read anew for every call (projected tokens rotate); the CA at every connect.
A coordinator that does not answer stops nothing: back off, try again, training goes on.
"""

import http.client
import logging
import os
import random
import select
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from qlora_api.run import Membership, Report

HEARTBEAT_SECONDS = 0.5  # the coordinator's lease is a few of these
_ANSWER_SECONDS = 5.0  # beyond the time that a call may be held
_MAX_BACKOFF_SECONDS = 2.0

log = logging.getLogger(__name__)


class Line:
    """One keep-alive connection that carries one call at a time. Every failure is an OSError."""

    def __init__(self, url: str, token: Path, ca: Path) -> None:
        self._parts = urlsplit(url)
        self._token, self._ca = token, ca
        self._connection: http.client.HTTPConnection | None = None

    def send(self, report: Report) -> None:
        """Post the report; the answer is read by receive()."""
        try:
            connection = self._connection = self._connection or self._connect()
            headers = {"Content-Type": "application/json"}
            if self._token.is_file():
                headers["Authorization"] = f"Bearer {self._token.read_text().strip()}"
            connection.request("POST", self._parts.path, report.model_dump_json(by_alias=True).encode(), headers)
        except (http.client.HTTPException, OSError) as error:
            self.close()
            raise ConnectionError(f"{self._parts.netloc}: {error or type(error).__name__}") from error

    def receive(self) -> Membership:
        """The answer to the last report."""
        assert self._connection is not None
        try:
            response = self._connection.getresponse()
            body = response.read()
        except (http.client.HTTPException, OSError) as error:
            self.close()
            raise ConnectionError(f"{self._parts.netloc}: {error or type(error).__name__}") from error
        if response.status != 200:
            self.close()
            raise ConnectionError(f"{self._parts.netloc} answered {response.status}: {body[:200]!r}")
        return Membership.model_validate_json(body)

    def fileno(self) -> int:
        """For select: readable when the answer begins to arrive."""
        assert self._connection is not None and self._connection.sock is not None
        return self._connection.sock.fileno()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self) -> http.client.HTTPConnection:
        host = self._parts.hostname or ""
        timeout = HEARTBEAT_SECONDS + _ANSWER_SECONDS
        if self._parts.scheme == "http":
            return http.client.HTTPConnection(host, self._parts.port, timeout=timeout)
        context = ssl.create_default_context(cafile=str(self._ca) if self._ca.is_file() else None)
        return http.client.HTTPSConnection(host, self._parts.port, timeout=timeout, context=context)


class SyncThread(threading.Thread):
    """Keeps a call open; `report(wait_seconds)` says what to tell, `hear` takes the answers."""

    def __init__(
        self,
        url: str,
        token: Path,
        ca: Path,
        report: Callable[[float], Report],
        hear: Callable[[Membership], None],
        urgent: int,
    ) -> None:
        super().__init__(name="sync", daemon=True)
        self._held, self._quick = Line(url, token, ca), Line(url, token, ca)
        self._report, self._hear, self._urgent = report, hear, urgent
        self._ended = threading.Event()
        self.num_answers = 0

    def run(self) -> None:
        failures = 0
        while not self._ended.is_set():
            try:
                self._exchange()
                failures = 0
            except ConnectionError as error:
                failures += 1
                if failures in (1, 10) or failures % 100 == 0:
                    log.warning("no answer from the coordinator (%d times): %s", failures, error)
                pause = min(_MAX_BACKOFF_SECONDS, 0.1 * 2 ** min(failures, 8))
                self._ended.wait(pause * (0.5 + random.random() / 2))

    def end(self, seconds: float) -> bool:
        """Wait until what the report says now has been answered; False after `seconds`."""
        deadline, goal = time.monotonic() + seconds, self.num_answers + 2
        while self.num_answers < goal and time.monotonic() < deadline:
            time.sleep(0.02)
        answered = self.num_answers >= goal
        self._ended.set()
        return answered

    def _exchange(self) -> None:
        """One held call, and quick ones beside it while it is held."""
        self._drain()
        self._held.send(self._report(HEARTBEAT_SECONDS))
        deadline = time.monotonic() + HEARTBEAT_SECONDS + _ANSWER_SECONDS
        while True:
            held, left = self._held.fileno(), max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([held, self._urgent], [], [], left)
            if self._urgent in ready:
                self._drain()
                self._quick.send(self._report(0.0))
                self._take(self._quick)
            if held in ready:
                self._take(self._held)
                return
            if not ready:
                self._held.close()
                raise ConnectionError("the coordinator does not answer")

    def _take(self, line: Line) -> None:
        self._hear(line.receive())
        self.num_answers += 1

    def _drain(self) -> None:
        try:
            while os.read(self._urgent, 4096):
                pass
        except BlockingIOError:
            pass
