"""The status page: one HTML document without anything from elsewhere, and the stream of events that it draws.

``GET /`` is the document, ``GET /events`` server-sent events: first all of the run's state, then at most twice a second
what has changed. Who may ask is decided before (``engine.port_access``), what is sent in ``feed``. A browser that reads
slowly, or not at all, is sent less and in the end nothing: it costs one message of memory and never a wait.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import socket
from importlib import resources

import msgspec
from aiohttp import web

from engine.clock import Clock
from engine.monitor.feed import Feed
from engine.tracing import log

TURN_S = 0.5
MAX_STREAMS = 16
"""Pages that may be open; each costs a few kB a second."""
_HEARTBEAT_S = 10.0
"""Proxies close what is silent for longer than half a minute or so; and only who writes hears that a browser left."""
_STUCK_S = 30.0
"""A browser that has taken nothing for this long is hung up on; it comes back by itself when it can."""
_RETRY_MS = 2_000
_SEND_BUFFER = 128 << 10
"""Bytes that the system keeps for a browser that does not read; by itself it would take megabytes of old news."""


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """The page and what a browser may do with it."""

    body: bytes
    policy: str
    """Content-Security-Policy: the document's own script and style, its own port, nothing else."""


def load_document() -> Document:
    """Put the files of ``page/`` together."""
    folder = resources.files("engine.monitor").joinpath("page")
    html, style, script = (
        folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")
    )
    for place, text in (("/* page.css */", style), ("/* page.js */", script)):
        assert html.count(place) == 1, f"page.html must have {place} once"
        html = html.replace(place, text)
    policy = (
        f"default-src 'none'; script-src {_hash_of(script)}; style-src {_hash_of(style)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Document(body=html.encode(), policy=policy)


def _hash_of(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


class StatusPage:
    """Serves one ``feed``.

    One task takes in the feed's lines, twice a second, whether anybody looks or not.
        waits for:     the next turn
        unblocked by:  the clock

    Each stream is a request handler.
        waits for:     the next turn, never for its browser
        unblocked by:  that task
    """

    def __init__(self, feed: Feed, *, clock: Clock) -> None:
        self._feed = feed
        self._clock = clock
        self._document = load_document()
        self._turn = asyncio.Event()
        """Set once, at the next turn; each turn has its own."""
        self._task: asyncio.Task[None] | None = None
        self._num_streams = 0
        self._ended: str | None = None
        """Why there are no streams any more."""

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._take_turns())

    async def close(self) -> None:
        """Send every stream the last state and end it. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        if self._ended is None:
            await self._take_in()
            self._end("the node is stopping")

    async def page(self, _: web.Request) -> web.Response:
        return web.Response(
            body=self._document.body,
            content_type="text/html",
            charset="utf-8",
            headers={"Content-Security-Policy": self._document.policy},
        )

    async def events(self, request: web.Request) -> web.StreamResponse:
        if self._ended is not None:
            raise web.HTTPServiceUnavailable(text=f"{self._ended}\n", headers={"Retry-After": "5"})
        if self._num_streams >= MAX_STREAMS:
            raise web.HTTPServiceUnavailable(
                text=f"{MAX_STREAMS} pages of this run are open, no more are served; close one of them\n",
                headers={"Retry-After": "5"},
            )
        self._num_streams += 1
        try:
            return await self._stream(request)
        finally:
            self._num_streams -= 1

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        transport = request.transport
        if transport is None:
            return response
        # With a limit that one message cannot reach, write() never waits for the browser; whether it has taken the
        # last message is asked instead.
        transport.set_write_buffer_limits(high=1 << 30)
        _keep_little(transport)
        reader = self._feed.reader()
        wrote_at = self._clock.now()
        await response.write(b"retry: %d\n\n" % _RETRY_MS)
        while not transport.is_closing():
            turn, is_last = self._turn, self._ended is not None
            idle_s = self._clock.now() - wrote_at
            if is_last or transport.get_write_buffer_size() == 0:
                message = _message(reader.news(), is_last=is_last, is_due=idle_s >= _HEARTBEAT_S)
                if message:
                    await response.write(message)
                    wrote_at = self._clock.now()
            elif idle_s > _STUCK_S:
                transport.abort()
            if is_last:
                break
            await turn.wait()
        return response

    async def _take_turns(self) -> None:
        while True:
            await self._clock.sleep(TURN_S)
            try:
                await self._take_in()
            except Exception as error:
                # The page is lost and the run goes on: nothing of it depends on being looked at.
                log.error("monitor.ended", error=repr(error), exc_info=error)
                self._end(f"the page of this run has failed: {error!r}")
                return
            turn, self._turn = self._turn, asyncio.Event()
            turn.set()

    async def _take_in(self) -> None:
        there_is_more = self._feed.take_in()
        while there_is_more:
            await self._clock.sleep(0)  # the actors' turn
            there_is_more = self._feed.take_in()

    def _end(self, why: str) -> None:
        self._ended = why
        self._turn.set()


def _message(news: bytes, *, is_last: bool, is_due: bool) -> bytes:
    """What is written in one turn; ``is_due``: something has to be, lest the connection be taken for dead."""
    message = b"event: state\ndata: " + news + b"\n\n" if news else b""
    if is_last:
        return message + b"event: end\ndata: {}\n\n"
    return message or (b": still here\n\n" if is_due else b"")


def _keep_little(transport: asyncio.Transport) -> None:
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
