"""The agent's line to the coordinator: heartbeat, report and membership in one held call.

Rules: a call is held open HEARTBEAT_SECONDS and renewed at once. What cannot wait goes over a second connection, by a
thread of its own: neither waits for the other's answer, nor breaks when the other does. Reports are sent in the order
in which they are made, so none overtakes another by more than the network lets it.
The token is read anew for every call (projected tokens rotate); the CA at every connect.
A coordinator that does not answer stops nothing: back off, try again, training goes on.
"""

import http.client
import itertools
import logging
import math
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
_LOOK_SECONDS = 1.0  # so often the thread of urgent reports looks whether all is over

log = logging.getLogger(__name__)


class Line:
    """One keep-alive connection that carries one call at a time. Every failure is an OSError."""

    def __init__(self, url: str, token: Path, ca: Path) -> None:
        self._parts = urlsplit(url)
        self._token, self._ca = token, ca
        self._connection: http.client.HTTPConnection | None = None

    def connect(self) -> None:
        """Beforehand: a name that resolves slowly must not hold up a report that is made."""
        if self._connection is not None:
            return
        try:
            self._connection = self._new_connection()
            self._connection.connect()
        except (http.client.HTTPException, OSError) as error:
            self.close()
            raise ConnectionError(f"{self._parts.netloc}: {error or type(error).__name__}") from error

    def send(self, report: Report) -> None:
        """Post the report; the answer is read by receive()."""
        connection = self._connection
        assert connection is not None, "connect first"
        try:
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

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _new_connection(self) -> http.client.HTTPConnection:
        host = self._parts.hostname or ""
        timeout = HEARTBEAT_SECONDS + _ANSWER_SECONDS
        if self._parts.scheme == "http":
            return http.client.HTTPConnection(host, self._parts.port, timeout=timeout)
        context = ssl.create_default_context(cafile=str(self._ca) if self._ca.is_file() else None)
        return http.client.HTTPSConnection(host, self._parts.port, timeout=timeout, context=context)


class SyncThread(threading.Thread):
    """Keeps a call open; `report(wait_seconds)` says what to tell, `hear` takes the answers. Both are called by two
    threads. What is readable at `urgent` has a report made at once."""

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
        self._order = threading.Lock()  # from making a report to its being sent
        self._answered = -math.inf  # when the newest report that has its answer was made

    def run(self) -> None:
        threading.Thread(target=self._hurry, name="sync-urgent", daemon=True).start()
        while not self._ended.is_set():
            self._call(self._held, HEARTBEAT_SECONDS)

    def end(self, seconds: float) -> bool:
        """Wait until what the report says now has been answered; False after `seconds`."""
        start = time.monotonic()
        while self._answered < start and time.monotonic() < start + seconds:
            time.sleep(0.02)
        self._ended.set()
        return self._answered >= start

    def _hurry(self) -> None:
        """Thread: what cannot wait."""
        while not self._ended.is_set():
            if select.select([self._urgent], [], [], _LOOK_SECONDS)[0]:
                self._drain()
                self._call(self._quick, 0.0)

    def _call(self, line: Line, wait_seconds: float) -> None:
        """Report and hear the answer, again and again until there is one or all is over."""
        for failures in itertools.count(1):
            try:
                line.connect()
                with self._order:
                    made = time.monotonic()
                    line.send(self._report(wait_seconds))
                answer = line.receive()
                break
            except ConnectionError as error:
                if failures in (1, 10) or failures % 100 == 0:
                    log.warning("no answer from the coordinator (%d times): %s", failures, error)
                pause = min(_MAX_BACKOFF_SECONDS, 0.1 * 2 ** min(failures, 8))
                if self._ended.wait(pause * (0.5 + random.random() / 2)):
                    return
        self._hear(answer)
        with self._order:
            self._answered = max(self._answered, made)

    def _drain(self) -> None:
        try:
            while os.read(self._urgent, 4096):
                pass
        except BlockingIOError:
            pass
