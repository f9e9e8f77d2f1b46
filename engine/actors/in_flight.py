"""Keeps a bounded number of coroutines going and lets no failure among them pass unnoticed. Knows nothing of what they
do."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class InFlight:
    """A bounded crew of tasks::

    tasks = InFlight(limit=8)
    try:
        await tasks.start(work())  # waits while 8 are going; raises what an earlier one raised
        await tasks.join()
    finally:
        await tasks.cancel()
    """

    def __init__(self, *, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"limit must be >= 1 task, got {limit}")
        self._limit = limit
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._tasks)

    async def room(self) -> None:
        """Return when another task may be started.

        Raises:
            Exception: what one of the tasks raised.
        """
        while len(self._tasks) >= self._limit and self._failure is None:
            await self._change()
        self._raise()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Start a task now; call ``room`` before."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    async def join(self) -> None:
        """Return when no task is left.

        Raises:
            Exception: what one of the tasks raised.
        """
        while self._tasks and self._failure is None:
            await self._change()
        self._raise()

    async def cancel(self) -> None:
        """Cancel what is left and wait for it. What a task raises on its way out is raised by ``join`` or not at
        all."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (failure := task.exception()) is not None and self._failure is None:
            self._failure = failure
        self._changed.set()

    def _raise(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


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
