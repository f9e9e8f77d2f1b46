"""The node as the outside sees it, on one port: the status page (``/``, ``/events``) and ``/healthz /readyz /metrics
/status``. Read-only. Who may ask is decided in ``engine.port_access``, what the page shows in ``engine.monitor``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from engine.clock import Clock
from engine.errors import RecipeError
from engine.monitor.feed import Feed
from engine.monitor.status_page import StatusPage
from engine.port_access import Access, is_same_origin
from engine.recipe import NodeConfig
from engine.tracing import log
from teacher.token import read_token

_OPEN_TO_ALL = ("/healthz", "/readyz")
"""Probes of schedulers carry no token and any name, and learn nothing but alive or ready."""

_HEADERS = {
    # What is told is of this moment and for this reader; nothing of it may be kept, framed, guessed at or passed on.
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
_COOKIE_LIFE_S = 30 * 24 * 3600
_END_S = 2.0
"""How long a client that is being answered may hold up the end of a run."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpPort:
    """Serves what the callables return, and the page of ``feed``.

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
        feed: Feed,
        clock: Clock,
    ) -> None:
        self._config = config
        self._is_ready = is_ready
        self._status = status
        self._metrics = metrics
        self._access = Access(None if config.token_file is None else read_token(config.token_file))
        self._page = StatusPage(feed, clock=clock)
        self._runner: web.AppRunner | None = None
        self._cookie_name = ""

    async def start(self) -> int:
        """Listen; returns the port.

        Raises:
            RecipeError: the address cannot be had.
        """
        app = web.Application(middlewares=[self._authorize])
        app.router.add_get("/", self._get_page)
        app.router.add_get("/events", self._page.events, allow_head=False)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/status", self._get_status)
        app.router.add_get("/metrics", self._get_metrics)
        app.on_response_prepare.append(_add_headers)
        app.on_shutdown.append(self._end_page)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=_END_S)
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
        # Browsers tell cookies apart by host and not by port: two runs on one machine must not take each other's.
        self._cookie_name = f"node_{port}"
        self._page.start()
        log.info("node.listening", host=self._config.host, port=port, has_token=self._access.needs_token)
        return port

    async def stop(self) -> None:
        """Tell the open pages how it ended, and close. Idempotent."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _end_page(self, _: web.Application) -> None:
        await self._page.close()

    @web.middleware
    async def _authorize(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path in _OPEN_TO_ALL:
            return await handler(request)
        host = request.headers.get("Host")
        if not self._access.knows_host(host):
            raise web.HTTPForbidden(
                text=f"this port is asked as localhost or 127.0.0.1, and the request says Host: {host}. To read it "
                "under another name, set node.token_file\n"
            )
        if not is_same_origin(request.headers.get("Origin"), host):
            raise web.HTTPForbidden(text="a page of another origin may not read this port\n")
        if request.path == "/" and self._access.is_token(request.query.get("token", "")):
            raise self._with_cookie()
        if not self._access.allows(
            authorization=request.headers.get("Authorization"), cookie=request.cookies.get(self._cookie_name)
        ):
            raise _unauthorized(request)
        return await handler(request)

    def _with_cookie(self) -> web.HTTPSeeOther:
        """Sends the browser on to the page without the token: out of the address bar, the history, the bookmarks."""
        answer = web.HTTPSeeOther("./")
        answer.set_cookie(
            self._cookie_name,
            self._access.cookie,
            max_age=_COOKIE_LIFE_S,
            httponly=True,
            samesite="Strict",
            path="/",
        )
        return answer

    async def _get_page(self, request: web.Request) -> web.Response:
        if "token" in request.query:
            # One that is not asked for: it need not stay in the address bar either.
            raise web.HTTPSeeOther("./")
        return await self._page.page(request)

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        return web.Response(text="ready\n") if self._is_ready() else web.Response(text="starting\n", status=503)

    async def _get_status(self, _: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(self._status()), content_type="application/json")

    async def _get_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


async def _add_headers(_: web.Request, response: web.StreamResponse) -> None:
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)


def _unauthorized(request: web.Request) -> web.HTTPUnauthorized:
    headers = {"WWW-Authenticate": "Bearer"}
    if request.path != "/":
        return web.HTTPUnauthorized(
            text="send the token of node.token_file as: Authorization: Bearer TOKEN\n", headers=headers
        )
    # The link is for who has the cookie and followed a link of another site: browsers leave out Strict cookies then.
    return web.HTTPUnauthorized(
        text="<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        "<title>token needed</title><p>This page wants the token of <code>node.token_file</code>: open it once as "
        "<code>/?token=TOKEN</code>.<p>If this browser has shown it before, <a href='./'>go on</a>.",
        content_type="text/html",
        headers=headers,
    )
