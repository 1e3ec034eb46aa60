"""Observe, decide, act: one task a run, woken by changes and by its own deadlines.

The order of a pass: read everything, decide, write the status, tell the agents, carry out the actions, then events and
metrics. Wake-ups coalesce; errors are tried again with growing pauses; a status that changed meanwhile is read again.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime

from aiohttp import ClientError

from qlora_operator.clock import wait_at_most
from qlora_operator.cluster import Cluster
from qlora_operator.coordinator import Coordinator
from qlora_operator.decide import decide
from qlora_operator.kube import ApiError
from qlora_operator.logs import run_name
from qlora_operator.metrics import Metrics
from qlora_operator.settings import Settings
from qlora_operator.state import Key, Observed, Refusal

log = logging.getLogger(__name__)
SHORTEST_PAUSE, LONGEST_PAUSE = 0.2, 10.0
REFUSED_PAUSE = 5.0


class Reconciler:
    """All runs' tasks."""

    def __init__(
        self,
        cluster: Cluster,
        settings: Settings,
        ca_bundle: Callable[[], str] = str,
    ) -> None:
        self.coordinator = Coordinator(settings, cluster.review, self.wake)
        self.metrics = Metrics(self.coordinator.tables)
        self._cluster, self._settings, self._ca_bundle = cluster, settings, ca_bundle
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._wakes: dict[Key, asyncio.Event] = {}
        self._refusals: dict[Key, tuple[Refusal, ...]] = {}

    def wake(self, key: Key) -> None:
        """Something about this run changed, or might have."""
        self._wakes.setdefault(key, asyncio.Event()).set()
        if key not in self._tasks:
            self._tasks[key] = asyncio.create_task(self._drive(key), name=f"{key.namespace}/{key.name}")

    async def resync(self) -> None:
        """For ever: wake every run now and then, whatever watches may have missed."""
        while True:
            try:
                for key in await self._cluster.list_runs(self._settings.namespaces):
                    self.wake(key)
                self.coordinator.ready = True
            except (OSError, ClientError, TimeoutError) as error:
                log.warning("cannot list runs, trying again: %s", error)
                await asyncio.sleep(LONGEST_PAUSE / 5)
                continue
            await asyncio.sleep(self._settings.resync_seconds)

    async def stop(self) -> None:
        """Cancel all tasks; a pass that is cut is repaired by the next process."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.coordinator.close()

    async def reconcile(self, key: Key) -> float | None:
        """One pass. Seconds until the next at the latest, or None when the run is gone."""
        now = datetime.now(UTC)
        sight = await self._cluster.observe(key, now)
        if sight is None:
            self.coordinator.forget(key)
            self.metrics.forget(key)
            return None
        seen, heard = sight.seen, self.coordinator.heard(key)
        observed = Observed(**vars(seen), **vars(heard), now=now, refusals=self._refusals.get(key, ()))
        decision = decide(observed, self._settings, self._ca_bundle())
        if decision.status != seen.status:
            await self._cluster.write_status(sight.raw, decision.status)
        self.coordinator.publish(key, decision.membership, [pod.uid for pod in seen.pods])
        refusals = await self._cluster.perform(key, decision.actions)
        self._refusals[key] = refusals
        self.metrics.count(key, seen.status, decision.status)
        for event in decision.events:
            log.info("%s: %s", event.reason, event.message)
        await self._cluster.tell(seen.run.identity, decision.events, now)
        return min(decision.requeue_after, REFUSED_PAUSE) if refusals else decision.requeue_after

    async def _drive(self, key: Key) -> None:
        """Passes over one run until it is gone."""
        run_name.set(f"{key.namespace}/{key.name}")
        pause: float | None = 0.0
        failures = 0
        while pause is not None:
            await self._sleep(key, pause)
            start = time.monotonic()
            try:
                pause = await self.reconcile(key)
                failures = 0
            except ApiError as error:
                pause = self._back_off(error, failures) if error.status != 409 else 0.0
                failures += error.status != 409
            except Exception as error:  # the outermost loop: one run's trouble must not end the others
                pause = self._back_off(error, failures)
                failures += 1
            self.metrics.pass_seconds.observe(time.monotonic() - start)
            if failures:
                await asyncio.sleep(pause or 0.0)
                pause = 0.0
        self._refusals.pop(key, None)
        del self._tasks[key]
        if self._wakes.pop(key).is_set():
            self.wake(key)

    async def _sleep(self, key: Key, seconds: float) -> None:
        """Until something wakes the run, at most so long."""
        event = self._wakes[key]
        if seconds > 0:
            await wait_at_most(event, seconds)
        event.clear()

    def _back_off(self, error: Exception, failures: int) -> float:
        pause = min(LONGEST_PAUSE, SHORTEST_PAUSE * 2.0 ** min(failures, 10)) * random.uniform(0.8, 1.2)
        self.metrics.pass_errors.labels(type(error).__name__).inc()
        expected = isinstance(error, OSError | ClientError | TimeoutError)
        log.warning("pass failed, again in %.1f s: %s", pause, error, exc_info=not expected)
        return pause
