"""Keeps a bounded number of coroutines going and lets no failure among them pass unnoticed. Knows nothing of what they
do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from types import TracebackType
from typing import Any, Self, TypeVar

from engine.errors import EndOfChannel
from engine.transport.channel import Receiver

T = TypeVar("T")


class InFlight:
    """A task group with a limit, which is asked for before each start::

        async with InFlight(limit=lambda: 8) as tasks:
            async for item in channel:
                await tasks.room()  # waits while 8 are going
                tasks.start(work(item))

    The block is left when all have ended. When one fails, the others and whatever the block waits for are cancelled,
    and its exception leaves the block as it is (not in a group; how many more failed is noted on it).
    """

    def __init__(self, *, limit: Callable[[], int]) -> None:
        self._limit = limit
        self._group = asyncio.TaskGroup()
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._tasks)

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._group.__aexit__(kind, error, traceback)
        except BaseExceptionGroup as group:
            first = group.exceptions[0]
            if len(group.exceptions) > 1:
                first.add_note(f"and {len(group.exceptions) - 1} more of what was in flight failed")
            raise first from None

    async def room(self) -> None:
        """Return when another task may be started: at once when none is going. A limit that has risen is seen when a
        task ends."""
        while self._tasks and len(self._tasks) >= self._limit():
            await self._change()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Start a task now; call ``room`` before."""
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._changed.set()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


async def work_through(
    source: Receiver[T],
    work: Callable[[T], Coroutine[Any, Any, None]],
    *,
    limit: Callable[[], int],
    again: Iterable[T] = (),
    until: Callable[[], Coroutine[Any, Any, None]],
) -> None:
    """Have ``work`` done for what is in ``again`` and then for what ``source`` brings, at most ``limit()``
    items at a time.

    Returns when the source has ended and everything is done. When ``until`` returns before that, what is going on is
    cancelled, and what still comes is taken and dropped: whoever sends must not be left waiting for room.

    ``work`` is called at once for each item taken, so what it does before it returns its coroutine cannot be cancelled.
    """

    async def take_in() -> None:
        async with InFlight(limit=limit) as tasks:
            for item in again:
                await tasks.room()
                tasks.start(work(item))
            while True:
                await tasks.room()
                try:
                    item = await source.receive()
                except EndOfChannel:
                    break
                tasks.start(work(item))

    await first_of(take_in(), until())
    async for _ in source:
        pass


async def first_of(*coroutines: Coroutine[Any, Any, object]) -> None:
    """Return when one has ended, raising what it raised; the others are cancelled."""
    tasks = [asyncio.get_running_loop().create_task(c) for c in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
