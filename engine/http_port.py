"""The node as the outside sees it: ``/healthz /readyz /metrics /status`` on one port. Read-only."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from engine.errors import RecipeError
from engine.recipe import NodeConfig
from engine.tracing import log
from teacher.token import is_authorized, read_token

_OPEN_TO_ALL = ("/healthz", "/readyz")
"""Probes of schedulers carry no token, and learn nothing but alive or ready."""


class HttpPort:
    """Serves what the callables return.

    Args:
        is_ready: every actor runs.
        status: anything msgspec can encode; sent as JSON.
        metrics: Prometheus text.
    """

    def __init__(
        self,
        config: NodeConfig,
        *,
        is_ready: Callable[[], bool],
        status: Callable[[], object],
        metrics: Callable[[], bytes],
    ) -> None:
        self._config = config
        self._is_ready = is_ready
        self._status = status
        self._metrics = metrics
        self._token = None if config.token_file is None else read_token(config.token_file)
        self._runner: web.AppRunner | None = None

    async def start(self) -> int:
        """Listen; returns the port.

        Raises:
            RecipeError: the address cannot be had.
        """
        app = web.Application(middlewares=[self._authorize])
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/status", self._get_status)
        app.router.add_get("/metrics", self._get_metrics)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._config.host, self._config.port)
        try:
            await site.start()
        except OSError as error:
            await self.stop()
            raise RecipeError(
                f"node.host={self._config.host!r} node.port={self._config.port} cannot be listened on: "
                f"{error.strerror or error}; choose another port, or 0 for any"
            ) from error
        port = int(self._runner.addresses[0][1])
        log.info("node.listening", host=self._config.host, port=port)
        return port

    async def stop(self) -> None:
        """Idempotent."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @web.middleware
    async def _authorize(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        given = request.headers.get("Authorization")
        if request.path not in _OPEN_TO_ALL and not is_authorized(given, self._token):
            raise web.HTTPUnauthorized(text="send the token of node.token_file as: Authorization: Bearer TOKEN\n")
        return await handler(request)

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        return web.Response(text="ready\n") if self._is_ready() else web.Response(text="starting\n", status=503)

    async def _get_status(self, _: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(self._status()), content_type="application/json")

    async def _get_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
