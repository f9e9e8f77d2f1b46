"""Waits that can be cut short: a scope that others may end, alarms that all ring after the same time, and an owner of
background tasks.

Scopes and alarms exist because a request must cost no task and no timer of its own: two microseconds instead of thirty.
Time is the ``Clock``'s, so that a test or a simulation decides when an alarm rings. Nothing here knows what is waited
for.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Generic, TypeVar

from engine.clock import Clock

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Interrupted(Exception):
    """The body of a ``Scope`` was ended by ``interrupt``."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Scope:
    """``with scope:`` around awaits of one task; ``scope.interrupt(reason)`` from elsewhere ends them.

    Works as ``asyncio.timeout`` does, by cancelling the task and taking the cancellation back at the end of the body,
    so a cancellation by somebody else passes through untouched, also when both come together. Scopes nest. The same
    scope can be entered again after it was left.

    Raises:
        Interrupted: at the end of the body.
    """

    __slots__ = ("_cancelling", "_reason", "_task")

    def __init__(self) -> None:
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self._reason: str | None = None

    def interrupt(self, reason: str) -> None:
        """End the body at its present await. Only the first call counts; without a body under way nothing happens."""
        if self._task is not None and self._reason is None:
            self._reason = reason
            self._task.cancel()

    def __enter__(self) -> Scope:
        task = asyncio.current_task()
        assert task is not None, "a Scope belongs to a task"
        self._task = task
        self._cancelling = task.cancelling()
        self._reason = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if self._reason is None:
            return
        assert task is not None
        if task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise Interrupted(self._reason) from None


class Alarms(Generic[ItemT]):
    """Rings for each item that was set ``after_s`` ago and not cleared since. Setting and clearing take no wait.

    ``run`` is the one task behind all items:
        waits for:     the time of the oldest item; an item, when there is none
        unblocked by:  the clock; ``set``
    """

    def __init__(self, clock: Clock, *, after_s: float, ring: Callable[[ItemT], None]) -> None:
        self._clock = clock
        self._after_s = after_s
        self._ring = ring
        # Every item waits equally long, so the order of setting is the order of ringing.
        self._due: OrderedDict[ItemT, float] = OrderedDict()
        self._idle: asyncio.Future[None] | None = None

    def set(self, item: ItemT, now: float) -> None:
        """Ring for ``item`` at ``now + after_s``. ``now`` is the clock's; items are set at most once at a time."""
        self._due[item] = now + self._after_s
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def clear(self, item: ItemT) -> None:
        """Do not ring; an item that has rung or was never set is ignored."""
        self._due.pop(item, None)

    async def run(self) -> None:
        """Ring, for ever. Wakes once per ``after_s`` while items come and go, and not at all when none come."""
        while True:
            if not self._due:
                self._idle = asyncio.get_running_loop().create_future()
                await self._idle
                if not self._due:
                    # Cleared already. Whatever is set during this sleep is due after it, so ``set`` need not wake us.
                    await self._clock.sleep(self._after_s)
                continue
            item, due = next(iter(self._due.items()))
            left = due - self._clock.now()
            if left > 0:
                await self._clock.sleep(left)
            else:
                del self._due[item]
                self._ring(item)


class Tasks:
    """Owns background tasks: holds on to them, ends them together, and tells when one has failed."""

    def __init__(self, *, on_failure: Callable[[BaseException], None]) -> None:
        self._on_failure = on_failure
        self._running: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, ResultT], name: str) -> asyncio.Task[ResultT]:
        """Run ``work``. Cancelling the task is no failure; any exception is, and goes to ``on_failure``."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    async def cancel(self) -> None:
        """Return when no task is left, also of those that are started meanwhile."""
        while self._running:
            for task in self._running:
                task.cancel()
            await asyncio.wait(set(self._running))

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(error)
