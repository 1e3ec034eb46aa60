"""The endpoint that agents report to and read their membership from: HTTPS, one held call an agent.

* Whose report it is follows from its token alone (TokenReview, kept for a short time): a pod of this run's service
  account. Agents need no right at the API server.
* A call is answered at once when the answer is news to the agent, else after `wait_seconds`, at most a third of the
  lease: it is heartbeat, progress and membership in one. A connection that breaks while it is held is noted.
* A new generation is told only after the status that holds it was written (`publish` is called then).
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable

from aiohttp import ClientError, web
from pydantic import ValidationError

from qlora_api import names
from qlora_api.run import SYNC_PATH, Membership, Report
from qlora_operator.clock import AttentiveClock, wait_at_most
from qlora_operator.settings import Settings
from qlora_operator.state import Heard, Key, PodIdentity
from qlora_operator.table import RunTable, is_newer, stop_answer

log = logging.getLogger(__name__)
Reviewer = Callable[[str], Awaitable[PodIdentity | None]]
_TRUSTED_SECONDS, _REFUSED_SECONDS, _STALE_SECONDS = 30.0, 2.0, 600.0
_MAX_REPORT_BYTES = 64 * 1024
_CACHED_TOKENS = 10_000
_GONE_SECONDS = 3600.0  # a deleted run's pods are long gone then


class Coordinator:
    """All runs' tables behind one web application."""

    def __init__(self, settings: Settings, review: Reviewer, wake: Callable[[Key], None]) -> None:
        self._settings, self._review, self._wake = settings, review, wake
        self._tables: dict[Key, RunTable] = {}
        self._gone: dict[Key, float] = {}  # since when
        self._news: dict[Key, asyncio.Event] = {}
        self._tokens: dict[bytes, tuple[float, PodIdentity | None]] = {}
        self._reviews: dict[bytes, asyncio.Task[PodIdentity | None]] = {}  # under way
        self._clock = AttentiveClock()
        self._ticker: asyncio.Task[None] | None = None
        self.ready = False

    # What the reconciler uses.

    def heard(self, key: Key) -> Heard:
        """What the run's agents said, with ages as of now."""
        return self._table(key).heard(self._clock.now())

    def publish(self, key: Key, answer: Membership, pod_uids: Iterable[str]) -> None:
        """Tell the run's agents; `pod_uids` are the pods that exist."""
        table = self._table(key)
        self._gone.pop(key, None)
        table.keep(pod_uids, self._clock.now())
        if table.publish(answer, self._clock.now()):
            self._announce(key)

    def forget(self, key: Key) -> None:
        """The run is gone: whoever still asks is told to stop."""
        self._tables.pop(key, None)
        now = self._clock.now()
        self._gone = {gone: since for gone, since in self._gone.items() if now - since < _GONE_SECONDS} | {key: now}
        self._announce(key)

    def tables(self) -> dict[Key, RunTable]:
        """For metrics."""
        return self._tables

    def close(self) -> None:
        """Stop the clock and what is under way."""
        for task in (self._ticker, *self._reviews.values()):
            if task is not None:
                task.cancel()

    # The web application.

    def application(self) -> web.Application:
        """Routes of the HTTPS port."""
        app = web.Application(client_max_size=_MAX_REPORT_BYTES)
        app.router.add_post(SYNC_PATH, self._sync)
        app.router.add_get("/healthz", self.healthz)
        app.router.add_get("/readyz", self.readyz)
        return app

    async def healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def readyz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok" if self.ready else "starting", status=200 if self.ready else 503)

    async def _sync(self, request: web.Request) -> web.Response:
        key = Key(request.match_info["namespace"], request.match_info["name"])
        pod = await self._identify(request)
        if (pod.namespace, pod.account) != (key.namespace, names.config_name(key.name)):
            raise web.HTTPForbidden(text=f"the token of {pod.pod_name} is not of a pod of run {key.name}")
        try:
            report = Report.model_validate_json(await request.read())
        except ValidationError as error:
            raise web.HTTPBadRequest(text=f"not a Report: {error}") from error
        table = self._table(key)
        is_news = table.receive(pod, report, self._clock.now())
        if is_news or table.answer is None:
            self._wake(key)
        try:
            answer = await self._wait_for_news(key, report)
        except asyncio.CancelledError:
            table.drop(pod, self._clock.now())
            self._wake(key)
            raise
        if answer is None:
            raise web.HTTPServiceUnavailable(text="the run has not been looked at yet: try again")
        return web.json_response(answer.to_wire())

    async def _wait_for_news(self, key: Key, report: Report) -> Membership | None:
        """The answer: as soon as it is news, or what there is when the time is over."""
        limit = self._settings.lease_seconds / 3
        start = time.monotonic()
        while True:
            answer = stop_answer() if key in self._gone else self._table(key).answer
            if answer is not None and is_newer(answer, report):
                return answer
            patience = min(report.wait_seconds, limit) if answer is not None else limit
            left = start + patience - time.monotonic()
            if left <= 0:
                return answer
            await wait_at_most(self._event(key), left)

    async def _identify(self, request: web.Request) -> PodIdentity:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme != "Bearer" or not token:
            raise web.HTTPUnauthorized(text="send the projected service account token as a bearer token")
        pod = await self._review_cached(token)
        if pod is None:
            raise web.HTTPUnauthorized(text="the token is not one of a pod for this audience, or its pod is gone")
        return pod

    async def _review_cached(self, token: str) -> PodIdentity | None:
        """TokenReview with a memory. A known token's report never waits for the API server: it is reviewed meanwhile,
        and trusted for longer while the API server is away."""
        digest, now = hashlib.sha256(token.encode()).digest(), time.monotonic()
        since, pod = self._tokens.get(digest, (-_STALE_SECONDS, None))
        if now - since < (_TRUSTED_SECONDS if pod else _REFUSED_SECONDS):
            return pod
        review = self._reviews.get(digest)
        if review is None:
            review = self._reviews[digest] = asyncio.create_task(self._remember(digest, token), name="token review")
            review.add_done_callback(lambda done: self._reviewed(digest, done))
        if pod is not None and now - since < _STALE_SECONDS:
            return pod
        try:
            return await asyncio.shield(review)
        except (OSError, ClientError, TimeoutError) as error:
            raise web.HTTPServiceUnavailable(text="the API server cannot be asked about the token") from error

    def _reviewed(self, digest: bytes, review: asyncio.Task[PodIdentity | None]) -> None:
        self._reviews.pop(digest, None)
        if not review.cancelled() and (error := review.exception()):
            log.debug("a token could not be reviewed: %s", error)

    async def _remember(self, digest: bytes, token: str) -> PodIdentity | None:
        pod = await self._review(token)
        if len(self._tokens) >= _CACHED_TOKENS:
            self._tokens.clear()
        self._tokens[digest] = (time.monotonic(), pod)
        return pod

    def _table(self, key: Key) -> RunTable:
        if self._ticker is None:
            self._ticker = asyncio.get_running_loop().create_task(self._clock.tick(), name="clock")
        return self._tables.setdefault(key, RunTable(known_since=self._clock.now()))

    def _event(self, key: Key) -> asyncio.Event:
        return self._news.setdefault(key, asyncio.Event())

    def _announce(self, key: Key) -> None:
        """Wake everybody who waits for news of this run."""
        self._news.pop(key, asyncio.Event()).set()
