"""The operator's two ports: the coordinator over HTTPS, metrics and probes in the clear."""

import asyncio
import logging
import ssl
from pathlib import Path

from aiohttp import web

from qlora_operator.reconcile import Reconciler
from qlora_operator.settings import Settings

log = logging.getLogger(__name__)
_CHECK_SECONDS = 60.0


class Server:
    """Both ports; renewed certificates are taken up while running."""

    def __init__(self, reconciler: Reconciler, settings: Settings, host: str = "") -> None:
        self._reconciler, self._settings, self._host = reconciler, settings, host or None
        self._runners: list[web.AppRunner] = []
        self._context: ssl.SSLContext | None = None
        self.ports: list[int] = []  # coordinator, metrics

    async def start(self) -> None:
        """Listen; raises OSError for a port in use and ssl.SSLError for a bad certificate."""
        settings = self._settings
        if settings.tls_cert:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(settings.tls_cert, settings.tls_key)
        await self._listen(self._reconciler.coordinator.application(), settings.listen_port, self._context)
        await self._listen(self._plain_application(), settings.metrics_port, None)

    async def _listen(self, app: web.Application, port: int, context: ssl.SSLContext | None) -> None:
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        site = web.TCPSite(runner, self._host, port, ssl_context=context)
        await site.start()
        self._runners.append(runner)
        self.ports.append(runner.addresses[0][1])

    def _plain_application(self) -> web.Application:
        coordinator = self._reconciler.coordinator
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/healthz", coordinator.healthz)
        app.router.add_get("/readyz", coordinator.readyz)
        return app

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self._reconciler.metrics.text(), content_type="text/plain", charset="utf-8")

    async def renew(self) -> None:
        """For ever: load the certificate again when its file changes; new connections get it."""
        if self._context is None:
            return
        loaded = _modified(self._settings.tls_cert)
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            try:
                if (changed := _modified(self._settings.tls_cert)) != loaded:
                    self._context.load_cert_chain(self._settings.tls_cert, self._settings.tls_key)
                    loaded = changed
            except (OSError, ssl.SSLError) as error:
                log.warning("the new certificate cannot be loaded, the old one stays: %s", error)

    async def stop(self) -> None:
        """Close both ports; held calls end at once, agents ask the next process."""
        for runner in self._runners:
            await runner.cleanup()


def _modified(path: str) -> float:
    return Path(path).stat().st_mtime
