"""Where facts go: one JSON line each in the run's ``events.jsonl``, and to whoever listens inside the process.

Names are ``noun.verb`` and constant, what varies goes into fields, units are in the keys (docs/events.md lists all of
them). Context that stays the same for a while is bound once with ``bound``. This module decides order, time and
delivery of lines; what they mean is decided where they are written and where they are read.

    log.info("rollout.dispatched", rollout_id=912)          # a fact
    with span("learner.step", step=41) as step:             # one line at its end, also on failure and cancellation
        step.add(loss=report.loss)
    with bound(actor="learner"):                            # every line inside carries actor
"""

from __future__ import annotations

import logging
import os
import platform
import socket
import sys
import time
import warnings
from collections.abc import Callable, Mapping, MutableMapping
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import msgspec
import structlog
from structlog.contextvars import bound_contextvars as bound
from structlog.typing import FilteringBoundLogger

from engine.errors import RunDirError, UserError

__all__ = ["Event", "Span", "Subscription", "Tracing", "bound", "human_line", "log", "span"]

Event = Mapping[str, Any]
"""One line, as it is written: plain values under string keys, ``t``, ``event`` and ``level`` always there."""

log: FilteringBoundLogger = structlog.get_logger()
"""The one logger. It looks up the configuration at each call, so that a line written before, during and after a
``Tracing`` each finds its way."""

_HEAD = ("kind", "actor", "step", "version", "rollout_id")
"""Keys that follow t, event, level, run and node, in this order, when a line has them."""

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

_MAX_HELD_LINES = 10_000
"""Lines kept from before ``open``; more than that means that nobody will open, so the rest is counted and left out."""

_span_clock_ns: ContextVar[Callable[[], int]] = ContextVar("span_clock_ns", default=time.monotonic_ns)
"""What spans are measured with: the machine's clock, or the virtual one of a simulation."""


class Span:
    """A piece of work, logged once at its end. Made by ``span``; enter it with ``with``, also around awaits."""

    __slots__ = ("_clock_ns", "_fields", "_name", "_start_ns")

    def __init__(self, name: str, fields: dict[str, object]) -> None:
        self._name = name
        self._fields = fields
        self._clock_ns = _span_clock_ns.get()
        self._start_ns = 0

    def add(self, **fields: object) -> None:
        """Fields that are known only at the end."""
        self._fields.update(fields)

    def __enter__(self) -> Self:
        self._start_ns = self._clock_ns()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        dur_us = (self._clock_ns() - self._start_ns) // 1_000
        fields = self._fields
        if kind is None:
            log.info(self._name, kind="span", **fields, outcome="ok", start_ns=self._start_ns, dur_us=dur_us)
            return
        # Being cancelled is how work ends that nobody needs any more: no reason to warn.
        emit = log.warning if issubclass(kind, Exception) else log.info
        if error is not None and str(error):
            fields = {**fields, "error": str(error)}
        emit(self._name, kind="span", **fields, outcome=kind.__name__, start_ns=self._start_ns, dur_us=dur_us)


def span(name: str, /, **fields: object) -> Span:
    """Log ``name`` once, at its end, with its duration and outcome.

    Written: ``kind="span"``, the fields, ``outcome`` ("ok" or the name of the exception's class, with its text in
    ``error``), ``start_ns`` (monotonic nanoseconds of this process) and ``dur_us``. A failure is a warning, a
    cancellation is not. The exception goes on unchanged.
    """
    return Span(name, fields)


class Subscription:
    """One listener inside the process. ``cancel()`` ends it; after a failure it has ended by itself.

    The listener is called in the thread that logs, before the log call returns: it must be quick and must not log.
    """

    __slots__ = ("_tracing", "listener", "name")

    def __init__(self, tracing: Tracing, name: str, listener: Callable[[Event], None]) -> None:
        self._tracing = tracing
        self.name = name
        self.listener = listener

    def cancel(self) -> None:
        """Idempotent."""
        self._tracing._detach(self)


class Tracing:
    """Takes over structlog and the standard library's logging and warnings of this process until ``close``.

    From the constructor on lines are held; ``open`` writes them to the run's folder, in front of what follows. All
    methods may be called from any thread; lines of different threads never mix, because each is one ``write`` to a
    file opened for append. A process has one ``Tracing`` at a time: structlog's configuration belongs to the process.
    """

    def __init__(self, *, level: str | None = None) -> None:
        """``level``: lines below it are not made ("debug", "info", "warning", "error"); None takes the environment
        variable ENGINE_LOG, and "info" without it.

        Raises:
            UserError: an unknown level.
        """
        name = level if level is not None else os.environ.get("ENGINE_LOG", "info")
        if name.lower() not in _LEVELS:
            raise UserError(f"log level {name!r} (ENGINE_LOG): expected one of {', '.join(_LEVELS)}")
        self._level = _LEVELS[name.lower()]
        self._identity: dict[str, str] = {}
        self._held: list[dict[str, Any]] | None = []
        self._file: _LineFile | None = None
        self._human: TextIO | None = None
        self._subscriptions: tuple[Subscription, ...] = ()
        self._now = _wall_clock
        self._encoder = msgspec.json.Encoder(enc_hook=_plain)
        self._before = structlog.get_config() if structlog.is_configured() else None
        structlog.configure(
            processors=[structlog.contextvars.merge_contextvars, self._deliver],
            wrapper_class=structlog.make_filtering_bound_logger(self._level),
            logger_factory=_Nowhere,
            cache_logger_on_first_use=False,
        )
        self._libraries = _Libraries(level=logging.INFO if self._level == logging.DEBUG else logging.WARNING)

    def open(
        self,
        folder: Path,
        *,
        run: str,
        node: str,
        human: bool = False,
        file_name: str = "events.jsonl",
        clock_ns: Callable[[], int] | None = None,
    ) -> None:
        """Append to ``folder/file_name`` from now on, first what has been held.

        Args:
            folder: exists already.
            run: name of the run, on every line.
            node: name of this process within it, on every line. Another process of the run writes another file,
                ``events-NODE.jsonl``: appends are atomic on a local disk only.
            human: every line also on stderr, for people. A live picture does without.
            clock_ns: virtual time of a simulation: spans and ``t`` follow it in this context and its tasks.

        A line that a killed process left unfinished is closed with a newline first; readers skip what does not parse.

        Raises:
            RunDirError: the file cannot be written.
        """
        if self._file is not None:
            raise RuntimeError(f"this Tracing already writes to {self._file.path}; close it first")
        self._file = _LineFile(folder / file_name)
        self._identity = {"run": run, "node": node}
        if clock_ns is not None:
            _span_clock_ns.set(clock_ns)
            self._now = _virtual_clock(clock_ns)
        self._human = sys.stderr if human else None
        self._libraries.adopt()
        held, self._held = self._held or [], None
        for line in held:  # listeners have had these
            line = {**_head_of(line), **self._identity, **line}
            self._file.append(self._encode(line))
            self._say(line)
        log.info(
            "log.opened",
            pid=os.getpid(),
            host=socket.gethostname(),
            python=platform.python_version(),
            start_ns=_span_clock_ns.get()(),
            healed=self._file.healed,
        )

    def subscribe(self, name: str, listener: Callable[[Event], None]) -> Subscription:
        """Give every later line to ``listener``, in the order in which its thread wrote them.

        A listener that raises is detached and reported with ``log.listener_failed``; the run goes on.
        """
        subscription = Subscription(self, name, listener)
        self._subscriptions = (*self._subscriptions, subscription)
        return subscription

    def adopt_libraries(self) -> None:
        """Route loggers that print by themselves (transformers, vllm) into this log. The constructor and ``open`` call
        it; call it again after libraries have been imported: they set themselves up then."""
        self._libraries.adopt()

    def close(self) -> None:
        """Give structlog, logging and warnings back as they were, and close the file. Idempotent."""
        if self._libraries.is_given_back:
            return
        self._libraries.give_back()
        if self._before is None:
            structlog.reset_defaults()
        else:
            structlog.configure(**self._before)
        self._subscriptions = ()
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        where = f"writing {self._file.path}" if self._file else "closed" if self._libraries.is_given_back else "holding"
        return f"<Tracing {where}, {len(self._subscriptions)} listeners>"

    def _deliver(self, logger: object, method: str, fields: MutableMapping[str, Any]) -> str:
        """structlog's last processor: puts the line in order and hands it on."""
        line: dict[str, Any] = {"t": self._now(), "event": fields.pop("event"), "level": method, **self._identity}
        for key in _HEAD:
            if key in fields:
                line[key] = fields.pop(key)
        if "exc_info" in fields:
            fields = structlog.processors.format_exc_info(logger, method, fields)  # adds "exception", drops exc_info
        line.update(fields)
        self._write(line)
        return ""

    def _write(self, line: dict[str, Any]) -> None:
        if self._held is not None:
            if len(self._held) < _MAX_HELD_LINES:
                self._held.append(line)
        elif self._file is not None:
            self._file.append(self._encode(line))
        self._say(line)
        for subscription in self._subscriptions:
            try:
                subscription.listener(line)
            except Exception as error:
                self._detach(subscription)
                log.error("log.listener_failed", listener=subscription.name, error=repr(error), exc_info=error)

    def _say(self, line: dict[str, Any]) -> None:
        if self._human is not None:
            self._human.write(human_line(line) + "\n")

    def _encode(self, line: dict[str, Any]) -> bytes:
        try:
            return self._encoder.encode(line)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            # A value that JSON cannot hold must not end the run that wanted to speak of it.
            safe = {str(key): ascii(value) for key, value in line.items()}
            return self._encoder.encode({**safe, **_head_of(line), "unencodable": ascii(error)})

    def _detach(self, subscription: Subscription) -> None:
        self._subscriptions = tuple(s for s in self._subscriptions if s is not subscription)


def human_line(event: Event) -> str:
    """One line for people, without newline: time, level if it matters, actor, name, fields, duration.

    Control characters in values are escaped, so that a model's answer cannot move the cursor.
    """
    local = datetime.fromisoformat(event["t"]).astimezone()
    parts = [local.strftime("%H:%M:%S.") + f"{local.microsecond // 1000:03d}"]
    if event["level"] not in ("info", "debug"):
        parts.append(event["level"].upper())
    if "actor" in event:
        parts.append(f"{_word(event['actor'])}:")
    parts.append(event["event"])
    parts += [f"{key}={_word(value)}" for key, value in event.items() if key not in _NOT_FOR_PEOPLE]
    if event.get("kind") == "span":
        if event["outcome"] != "ok":
            parts.append(f"-> {event['outcome']}")
        parts.append(f"({_duration(event['dur_us'])})")
    text = " ".join(parts)
    return f"{text}\n{event['exception']}" if "exception" in event else text


_NOT_FOR_PEOPLE = {
    *("t", "event", "level", "kind", "run", "node", "actor", "outcome", "start_ns", "dur_us", "exception"),
}


def _word(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str) and value.isprintable() and value and " " not in value:
        return value
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _duration(dur_us: int) -> str:
    if dur_us < 1_000:
        return f"{dur_us} us"
    return f"{dur_us / 1_000:.1f} ms" if dur_us < 1_000_000 else f"{dur_us / 1_000_000:.2f} s"


def _head_of(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: line[key] for key in ("t", "event", "level")}


def _wall_clock() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _virtual_clock(clock_ns: Callable[[], int]) -> Callable[[], str]:
    opened_at, opened_ns = datetime.now(UTC), clock_ns()

    def now() -> str:
        passed = timedelta(microseconds=(clock_ns() - opened_ns) // 1_000)
        return (opened_at + passed).isoformat(timespec="microseconds")

    return now


def _plain(value: Any) -> Any:
    """What msgspec cannot encode by itself: numpy and torch scalars as numbers, all else as text."""
    item = getattr(value, "item", None)
    if item is not None and getattr(value, "ndim", None) == 0:
        return item()
    return str(value)


class _LineFile:
    """Appends lines to a file, each with one ``write``, so that a killed process tears at most the last one.

    A line that cannot be written (disk full) is lost, the run goes on: its checkpoints decide whether it can. The first
    loss is said on stderr; the next line that fits is preceded by ``log.lines_lost``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            size = os.fstat(self._fd).st_size
            self.healed = size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"
        except OSError as error:
            raise RunDirError(
                f"cannot write {path}: {error.strerror}; give a folder that can be written with --out"
            ) from error
        self._is_torn = self.healed
        self._num_lost = 0

    def append(self, line: bytes) -> None:
        data = line + b"\n"
        if self._is_torn or self._num_lost:
            lost = f'{{"t":"{_wall_clock()}","event":"log.lines_lost","level":"error","num_lost":{self._num_lost}}}\n'
            data = b"\n" * self._is_torn + lost.encode() * bool(self._num_lost) + data
        try:
            written = os.write(self._fd, data)
        except OSError as error:
            self._lose(error.strerror or repr(error))
            return
        if written < len(data):
            self._is_torn = True
            self._lose("only a part of the line fitted")
            return
        self._is_torn = False
        self._num_lost = 0

    def _lose(self, why: str) -> None:
        self._num_lost += 1
        if self._num_lost == 1:
            sys.stderr.write(f"cannot write {self.path}: {why}; the run goes on, its log has a gap\n")

    def close(self) -> None:
        os.close(self._fd)


class _Nowhere:
    """The logger at the end of structlog's chain: everything has been delivered before it is reached."""

    def __init__(self, *_: object) -> None: ...

    def msg(self, _: str) -> None: ...

    debug = info = warning = error = critical = exception = log = msg


class _Libraries(logging.Handler):
    """Turns what libraries say through ``logging`` and ``warnings`` into ``log.message`` lines."""

    def __init__(self, *, level: int) -> None:
        super().__init__(level)
        self.is_given_back = False
        root = logging.getLogger()
        self._root_before = (list(root.handlers), root.level)
        self._adopted: list[tuple[logging.Logger, list[logging.Handler], bool]] = []
        self._showwarning_before = warnings.showwarning
        root.handlers[:] = [*(h for h in root.handlers if not _prints(h)), self]
        root.setLevel(level)
        logging.captureWarnings(True)
        self.adopt()

    def adopt(self) -> None:
        """Take the printing handlers of every logger away and let its records come up to the root."""
        for logger in list(logging.root.manager.loggerDict.values()):
            if isinstance(logger, logging.Logger) and any(_prints(h) for h in logger.handlers):
                self._adopted.append((logger, list(logger.handlers), logger.propagate))
                logger.handlers[:] = [h for h in logger.handlers if not _prints(h)]
                logger.propagate = True

    def emit(self, record: logging.LogRecord) -> None:
        level = "error" if record.levelno >= logging.ERROR else _level_name(record.levelno)
        try:
            message = record.getMessage()
        except (TypeError, ValueError):
            message = f"{record.msg} {record.args!r}"
        trace = {"exc_info": record.exc_info} if record.exc_info else {}
        getattr(log, level)("log.message", logger=record.name, message=message.strip(), **trace)

    def give_back(self) -> None:
        self.is_given_back = True
        logging.captureWarnings(False)
        warnings.showwarning = self._showwarning_before
        root = logging.getLogger()
        root.handlers[:], level = self._root_before
        root.setLevel(level)
        for logger, handlers, propagate in reversed(self._adopted):
            logger.handlers[:] = handlers
            logger.propagate = propagate


def _prints(handler: logging.Handler) -> bool:
    """Writes to this process's standard output or error (and not to a file or a buffer)."""
    if not isinstance(handler, logging.StreamHandler):
        return False
    stream = handler.stream
    if stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        return True
    try:
        return stream.fileno() in (1, 2)
    except (AttributeError, OSError, ValueError):  # io.UnsupportedOperation is both of the last
        return False


def _level_name(number: int) -> str:
    return "warning" if number >= logging.WARNING else "info" if number >= logging.INFO else "debug"
