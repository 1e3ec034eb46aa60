"""kopf's triggers: each only wakes a run. Nothing is decided here and nothing is written to the resource.

What kopf must not do, and how it is kept from it: only raw event handlers (no finalizers, no annotations, no retries,
no progress storage), no daemons or timers, no posting of log lines as events, no peering, watches that end when they
fall silent, pods watched by label only.
"""

import asyncio
from pathlib import Path
from typing import Any

import kopf

from qlora_api import names
from qlora_operator.cluster import Cluster
from qlora_operator.kube import Kube
from qlora_operator.reconcile import Reconciler
from qlora_operator.serve import Server
from qlora_operator.settings import Settings
from qlora_operator.state import Key


class Operator:
    """One process's parts, from start to stop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._background: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Connect, listen, and look at every run."""
        self.kube = await Kube.connect()
        self.reconciler = Reconciler(Cluster(self.kube), self.settings, self._ca_bundle)
        self.server = Server(self.reconciler, self.settings)
        await self.server.start()
        self._background = [
            asyncio.create_task(self.reconciler.resync(), name="resync"),
            asyncio.create_task(self.server.renew(), name="renew"),
        ]

    async def stop(self) -> None:
        """Leave everything as it is; the next process goes on."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self.server.stop()
        await self.reconciler.stop()
        await self.kube.close()

    def _ca_bundle(self) -> str:
        return Path(self.settings.ca_file).read_text() if self.settings.ca_file else ""


def register(operator: Operator) -> kopf.OperatorRegistry:
    """kopf's registry with our triggers for this operator."""
    registry = kopf.OperatorRegistry()

    def login(**kwargs: Any) -> Any:
        return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

    async def startup(settings: kopf.OperatorSettings, **_: Any) -> None:
        configure(settings)
        await operator.start()

    async def cleanup(**_: Any) -> None:
        await operator.stop()

    async def run_changed(namespace: str | None, name: str | None, **_: Any) -> None:
        operator.reconciler.wake(Key(namespace or "", name or ""))

    async def pod_changed(namespace: str | None, labels: kopf.Labels, **_: Any) -> None:
        operator.reconciler.wake(Key(namespace or "", labels[names.LABEL_RUN]))

    kopf.on.login(registry=registry)(login)
    kopf.on.startup(registry=registry)(startup)
    kopf.on.cleanup(registry=registry)(cleanup)
    kopf.on.event(names.GROUP, names.VERSION, names.PLURAL, registry=registry)(run_changed)
    kopf.on.event("", "v1", "pods", labels={names.LABEL_RUN: kopf.PRESENT}, registry=registry)(pod_changed)
    return registry


def configure(settings: kopf.OperatorSettings) -> None:
    """kopf's settings, against its traps."""
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.scanning.disabled = True  # no list of namespaces and CRDs: fewer rights
    settings.watching.inactivity_timeout = 70.0  # a watch without even a bookmark is dead
    settings.watching.reconnect_backoff = 0.1
    settings.watching.label_selectors["", "v1", "pods"] = names.LABEL_RUN
    settings.queueing.worker_limit = 64
    settings.queueing.error_delays = (0.2, 0.5, 1, 2, 5, 10)
    settings.networking.error_backoffs = (0.2, 0.5, 1, 2, 5, 10)
    settings.execution.default_backoff = 1.0
    settings.process.ultimate_exiting_timeout = 20.0
