"""What an actor is, when it may be started again, and the one thread it may own. Who runs actors is the supervisor."""

from __future__ import annotations

import asyncio
import contextvars
import enum
import functools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, ParamSpec, Protocol, TypeVar

import msgspec
import structlog

from engine.messages import Control
from engine.virtual_time import outside_work

P = ParamSpec("P")
R = TypeVar("R")

log = structlog.get_logger()


class ActorState(enum.Enum):
    """Where an actor is in its life; set by the supervisor alone."""

    NEW = "new"
    """Known, not started."""
    STARTING = "starting"
    """``start`` runs, or is done while others still start; also while a failed actor waits to be started again."""
    RUNNING = "running"
    DRAINING = "draining"
    """Running, and told to come to an end."""
    STOPPED = "stopped"
    """``run`` returned, or was cancelled by the supervisor."""
    FAILED = "failed"
    """An error that its policy does not forgive."""


class Actor(ABC):
    """One task, private state, typed channels.

    Collaborators come in through the constructor, keyword-only. The life of one incarnation: ``start``, then ``run``
    with any number of ``control`` beside it, then ``stop``, once for every ``start``, also when ``start`` or ``run``
    failed or was cancelled. A restarted actor goes through the same calls again on the same object, so ``start`` makes
    the state afresh.
    """

    def __init__(self, name: str) -> None:
        self.name: Final = name

    async def start(self) -> None:  # noqa: B027 (having nothing to make ready is normal)
        """Make ready what ``run`` needs. When it returns, other actors may rely on this one; they have not run yet."""

    @abstractmethod
    async def run(self) -> None:
        """Work until the input ends or a drain is complete, then return. What it cannot handle it raises."""

    async def control(self, message: Control) -> None:
        """Obey one message, called while ``run`` runs, in the order of sending and never behind data.

        The next message waits until this one returns; if ``run`` ends first, it is cancelled. What it raises is a
        failure of the actor. A restarted actor is told to drain again if it was draining; other messages that were
        handed to the one that failed are gone with it. Unless overridden, messages are only logged.
        """
        log.debug("actor.control_ignored", actor=self.name, message=type(message).__name__)

    async def stop(self) -> None:  # noqa: B027 (having nothing to give back is normal)
        """Give back what ``start`` took; must bear a ``start`` that came only half way."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"


class RestartPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How often an actor may fail before its failure is the run's."""

    max_restarts: int = 5
    """Within ``window_s``; one failure more escalates."""
    window_s: float = 600.0
    backoff_s: float = 0.5
    """Before the first restart in a window; doubles with each further one."""
    max_backoff_s: float = 30.0

    def __post_init__(self) -> None:
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts must be >= 0, got {self.max_restarts}")
        if not self.window_s > 0:
            raise ValueError(f"window_s must be > 0 seconds, got {self.window_s}")
        if not 0 <= self.backoff_s <= self.max_backoff_s:
            raise ValueError(
                f"backoff_s={self.backoff_s} and max_backoff_s={self.max_backoff_s} must satisfy "
                "0 <= backoff_s <= max_backoff_s seconds"
            )


def next_delay(policy: RestartPolicy, failure_times: Sequence[float], now: float) -> float | None:
    """Seconds to wait before the next start, or None: do not start again, escalate.

    Args:
        failure_times: when the actor failed, the failure to be decided included; clock seconds.
    """
    num_recent = sum(now - failed_at <= policy.window_s for failed_at in failure_times)
    if num_recent > policy.max_restarts:
        return None
    # The exponent is capped because 2.0 ** 1024 overflows; 2 ** 60 seconds is longer than any back-off.
    return min(policy.backoff_s * 2.0 ** min(max(num_recent - 1, 0), 60), policy.max_backoff_s)


class Caller(Protocol):
    """Where an actor has its blocking calls done: a ``Worker``, or in a simulation what takes virtual time for them."""

    async def call(self, fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R: ...

    async def close(self) -> None: ...


class Worker:
    """One thread, owned by one actor, where its blocking calls run one after the other.

    The thread bears the actor's name and starts with the first call.
    """

    def __init__(self, name: str) -> None:
        self.name: Final = name
        self._executor = ThreadPoolExecutor(max_workers=1, initializer=_name_thread, initargs=(name,))
        self._last: Future[None] | None = None

    async def call(self, fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run ``fn`` in the thread, after the calls made earlier, and return what it returns or raise what it raises.

        The caller's context variables are there (in a copy), so log lines keep their context. Cancelling the call
        drops it if it has not begun; once begun it runs to its end in the thread, and an error that then finds nobody
        waiting is logged.

        Raises:
            RuntimeError: the worker is closed, or ``fn`` raised StopIteration, which cannot pass through an await.
        """
        if self._last is not None:
            raise RuntimeError(f"worker {self.name!r} is closed; it cannot run {_name_of(fn)}")
        context = contextvars.copy_context()
        future: Future[R] = self._executor.submit(context.run, functools.partial(_call, fn, *args, **kwargs))
        try:
            with outside_work():
                return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(_log_unseen(self.name, _name_of(fn), context))
            raise

    async def close(self) -> None:
        """Accept nothing more, and return when the calls made so far have ended and the thread is gone.

        Idempotent. If it is cancelled, the thread still ends after its calls, and a second ``close`` waits for that.
        """
        if self._last is None:
            self._last = self._executor.submit(_nothing)
            self._executor.shutdown(wait=False)
        with outside_work():
            await asyncio.shield(asyncio.wrap_future(self._last))
        self._executor.shutdown(wait=True)  # the last call is done: this joins a thread that is on its way out


def _name_thread(name: str) -> None:
    threading.current_thread().name = name


def _nothing() -> None:
    return


def _call(fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    try:
        return fn(*args, **kwargs)
    except StopIteration as e:
        # A future refuses StopIteration, and whoever waits for it would wait for ever.
        raise RuntimeError(f"{_name_of(fn)} raised StopIteration in a worker; give next() a default") from e


def _name_of(fn: Callable[..., object]) -> str:
    return getattr(fn, "__qualname__", repr(fn))


def _log_unseen(worker: str, call: str, context: contextvars.Context) -> Callable[[Future[R]], None]:
    def log_error(future: Future[R]) -> None:
        error = None if future.cancelled() else future.exception()
        if error is not None:
            # Another copy: the call may still be inside the first one, and a context can be entered only once at a
            # time.
            context.copy().run(
                log.error, "worker.call_failed", worker=worker, call=call, error=repr(error), exc_info=error
            )

    return log_error
