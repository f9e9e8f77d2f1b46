"""The teacher as an HTTP service. Decides who is let in, how large a request may be and which status an outcome has.

What is scored with what, and when a request has to wait, is the batcher's decision. docs/protocol.md is this page in
words.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator

import msgspec
import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.errors import MalformedFrame, TeacherOverloaded, TeacherRefused, TeacherUnavailable, UserError
from teacher import wire
from teacher.batcher import Batcher
from teacher.token import is_authorized

log = structlog.get_logger()

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_OPEN_PATHS = ("/healthz", "/readyz")
"""Answered without a token: whoever supervises the process need not hold it."""

_SPARE_REQUESTS = 64
"""Score requests that may be open beyond those that may wait: the batch under way, and bodies still arriving."""


_REASON = web.ResponseKey("reason", str)
"""Of a refusal, for the log."""


class TeacherServer:
    """Routes of one service; ``start`` opens the port, ``stop`` closes it after the answers under way are written.

    Args:
        batcher: started and drained by the caller; until it is started, only ``/healthz``, ``/readyz`` and ``/metrics``
            have something to say.
        token: that ``Authorization: Bearer`` must carry, but not at ``/healthz`` and ``/readyz``; None: no token.
        max_request_bytes: of one body; more is 413.
        max_queue: the batcher's; bodies beyond that and a few are refused with 429 before they are read.
        body_timeout_s: how long one body may take to arrive; then 408. A connection that has not brought the head of
            its first request by then is closed.
    """

    def __init__(
        self,
        *,
        batcher: Batcher,
        token: str | None,
        max_request_bytes: int,
        max_queue: int,
        body_timeout_s: float = 30.0,
    ) -> None:
        self._batcher = batcher
        self._token = token
        self._max_request_bytes = max_request_bytes
        self._max_open = max_queue + _SPARE_REQUESTS
        self._body_timeout_s = body_timeout_s
        self._num_open = 0
        self._metrics = _Metrics(batcher)
        self._runner: web.AppRunner | None = None
        self._watching: asyncio.Task[None] | None = None
        self._silent: dict[web.RequestHandler, float] = {}
        """Connections without a request so far, and since when they are known."""
        self._heard: set[web.RequestHandler] = set()

    async def start(self, *, host: str, port: int) -> int:
        """Listen; returns the port, which is a free one when ``port`` is 0.

        Raises:
            UserError: the port is taken, or the host is not one of this machine.
        """
        app = web.Application(middlewares=[self._guard], client_max_size=self._max_request_bytes)
        app.router.add_post("/v1/score", self._score)
        app.router.add_get("/v1/info", self._info)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics_page)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            # A client that hangs up cancels its handler, and so leaves the queue.
            handler_cancellation=True,
            # No decompression: a few kilobytes could announce gigabytes.
            auto_decompress=False,
            logger=_http_log(),
            shutdown_timeout=5.0,
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, backlog=512)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise UserError(
                f"cannot listen on {host}:{port}: {error.strerror or error}; "
                "choose another --port (0 takes any free one) or stop whoever holds it"
            ) from None
        self._watching = asyncio.create_task(self._close_the_silent(), name="close silent connections")
        real_port: int = self._runner.addresses[0][1]
        return real_port

    async def stop(self) -> None:
        """Stop listening; connections are closed when their answers are written, after 5 s at most. Idempotent."""
        if self._watching is not None:
            self._watching.cancel()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _close_the_silent(self) -> None:
        """aiohttp waits for a head as long as it takes; a few thousand who never send one would hold every descriptor
        that this process may have. Runs until ``stop``."""
        assert self._runner is not None
        while (server := self._runner.server) is not None:
            await asyncio.sleep(self._body_timeout_s / 4)
            now = time.monotonic()
            open_now = set(server.connections)
            self._heard &= open_now
            self._silent = {one: self._silent.get(one, now) for one in open_now - self._heard}
            late = [one for one, since in self._silent.items() if now - since >= self._body_timeout_s]
            for one in late:
                one.force_close()
            if late:
                log.info("connection.refused", reason=f"no request within {self._body_timeout_s:g} s", num=len(late))

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Token first, then the handler; every outcome becomes a status with a JSON reason and is counted."""
        self._heard.add(request.protocol)
        began = time.monotonic()
        response = await self._outcome(request, handler)
        route = request.match_info.route.resource
        path = route.canonical if route is not None else "unknown"
        self._metrics.requests.labels(path=path, status=str(response.status)).inc()
        if path == "/v1/score":
            self._metrics.seconds.observe(time.monotonic() - began)
        if response.status >= 400 and request.path not in _OPEN_PATHS:
            log.info("request.refused", path=path, status=response.status, reason=response.get(_REASON, ""))
        return response

    async def _outcome(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        if request.path not in _OPEN_PATHS and not is_authorized(request.headers.get("Authorization"), self._token):
            return _error(
                401,
                "this teacher wants Authorization: Bearer with the token of its --token-file",
                headers={"WWW-Authenticate": "Bearer"},
            )
        try:
            return await handler(request)
        except MalformedFrame as error:
            return _error(400, str(error))
        except TeacherRefused as error:
            return _error(error.status, str(error))
        except TeacherOverloaded as error:
            return _error(429, str(error), retry_after_s=error.retry_after_s)
        except TeacherUnavailable as error:
            return _error(503, str(error))
        except web.HTTPRequestEntityTooLarge:
            return _error(413, f"the body is larger than {self._max_request_bytes} bytes, the limit of this teacher")
        except web.HTTPException as error:
            return _error(error.status, error.reason)
        # The last line of defence: one request must not take the others' service away.
        except Exception as error:
            log.exception("request.failed", path=request.path)
            return _error(500, f"{type(error).__name__} in the teacher; its log says where")

    async def _score(self, request: web.Request) -> web.StreamResponse:
        if self._num_open >= self._max_open:
            raise TeacherOverloaded(f"{self._num_open} requests are open, which is the limit", retry_after_s=1.0)
        self._num_open += 1
        try:
            body = await self._body(request)
            self._metrics.received_bytes.inc(len(body))
            wanted, values = wire.decode_request(body)
            scores = await self._batcher.score(wanted)
        finally:
            self._num_open -= 1
        frame = wire.encode_answer(scores, values=values, vocab_size=self._batcher.info.vocab_size)
        self._metrics.sent_bytes.inc(len(frame))
        return web.Response(body=frame, content_type=wire.CONTENT_TYPE)

    async def _body(self, request: web.Request) -> bytes:
        if (request.content_length or 0) > self._max_request_bytes:
            raise web.HTTPRequestEntityTooLarge(
                max_size=self._max_request_bytes, actual_size=request.content_length or 0
            )
        try:
            async with asyncio.timeout(self._body_timeout_s):
                return await request.read()
        except TimeoutError:
            raise web.HTTPRequestTimeout from None

    async def _info(self, _: web.Request) -> web.StreamResponse:
        if not self._batcher.is_started:
            raise TeacherUnavailable("the model is loading; wait until /readyz answers 200")
        return _json(200, self._batcher.info)

    async def _healthz(self, _: web.Request) -> web.StreamResponse:
        return _json(200, {"status": "ok"})

    async def _readyz(self, _: web.Request) -> web.StreamResponse:
        if self._batcher.is_ready:
            return _json(200, {"status": "ready"})
        return _error(503, "draining" if self._batcher.is_draining else "the model is loading")

    async def _metrics_page(self, _: web.Request) -> web.StreamResponse:
        return web.Response(body=generate_latest(self._metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


def check_exposure(host: str, *, has_token: bool, is_open: bool) -> None:
    """Refuse to be reachable from other machines without a token, unless that was said to be meant.

    Raises:
        UserError: ``host`` is not a loopback address, there is no token and ``is_open`` is False.
    """
    try:
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not (is_loopback or has_token or is_open):
        raise UserError(
            f"--host {host} can be reached from other machines and there is no --token-file; "
            "name a file with a token, bind to 127.0.0.1, or say --allow-anyone"
        )


class _Metrics(Collector):
    """Prometheus series of one service, in a registry of their own."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "teacher_requests", "HTTP requests by path and status", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "teacher_score_seconds",
            "From the head of a score request to its answer",
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
            registry=self.registry,
        )
        self.received_bytes = Counter("teacher_received_bytes", "Bodies of score requests", registry=self.registry)
        self.sent_bytes = Counter("teacher_sent_bytes", "Bodies of score answers", registry=self.registry)
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        now = self._batcher.statistics()
        gauges: dict[str, tuple[str, int]] = {
            "teacher_waiting_requests": ("Score requests in the queue", now.waiting),
            "teacher_computing_requests": ("Score requests in the batch under way", now.computing),
            "teacher_remembered_answers": ("Answers kept to be given again", now.remembered),
        }
        counters: dict[str, tuple[str, float]] = {
            "teacher_batches": ("Batches computed", now.batches_total),
            "teacher_scored_requests": ("Score requests answered by the model", now.requests_total),
            "teacher_repeated_requests": (
                "Score requests that were given another attempt's answer",
                now.repeated_total,
            ),
            "teacher_overloaded_requests": ("Score requests refused because of a full queue", now.overloaded_total),
            "teacher_withdrawn_requests": ("Score requests whose callers left the queue", now.withdrawn_total),
            "teacher_sequence_tokens": ("Prompt and response tokens of requests answered", now.sequence_tokens_total),
            "teacher_packed_tokens": ("The same, prefixes common to a batch counted once", now.packed_tokens_total),
            "teacher_busy_seconds": ("Time in which a batch was under way", now.busy_s),
        }
        yield from (GaugeMetricFamily(name, text, value=value) for name, (text, value) in gauges.items())
        yield from (CounterMetricFamily(name, text, value=value) for name, (text, value) in counters.items())


class _ToOurLog(logging.Handler):
    """What aiohttp has to say about connections that speak no HTTP, one line each: anyone can cause any number."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        reason = str(error).partition("\n")[0] if error is not None else record.getMessage()
        log.info("connection.refused", reason=reason)


def _http_log() -> logging.Logger:
    logger = logging.Logger("teacher.http", level=logging.WARNING)
    logger.addHandler(_ToOurLog())
    return logger


def _json(status: int, value: object, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        status=status, body=msgspec.json.encode(value), content_type="application/json", headers=headers
    )


def _error(
    status: int, text: str, *, retry_after_s: float | None = None, headers: dict[str, str] | None = None
) -> web.Response:
    headers = dict(headers or {})
    if retry_after_s is not None:
        # Whole seconds is all that the header can say.
        headers["Retry-After"] = str(math.ceil(retry_after_s))
    response = _json(status, wire.ErrorAnswer(error=text, retry_after_s=retry_after_s), headers)
    response[_REASON] = text
    return response
