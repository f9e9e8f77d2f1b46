"""Time and order in tests: nothing sleeps, the test says when time passes and when the others have had their turn."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Awaitable, Callable

Settle = Callable[[], Awaitable[None]]
"""Type of the ``settle`` fixture."""


async def settle() -> None:
    """Give every task its turns until all wait for something other than a turn.

    uvloop does not show what is ready, so this takes a number of turns that no chain of wake-ups in our tests comes
    near. Threads and sockets are not waited for.
    """
    for _ in range(100):
        await asyncio.sleep(0)


class ManualClock:
    """A ``Clock`` whose time moves only by ``advance``."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    def now(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        wake = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now + seconds, next(self._order), wake))
        await wake

    async def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass: sleepers wake at their own times, in order, and those they wake may sleep again."""
        until = self._now + seconds
        await settle()
        while self._sleepers and self._sleepers[0][0] <= until:
            due, _, wake = heapq.heappop(self._sleepers)
            self._now = max(self._now, due)
            if not wake.done():
                wake.set_result(None)
                await settle()
        self._now = until
        await settle()

    @property
    def num_sleeping(self) -> int:
        return sum(not wake.done() for _, _, wake in self._sleepers)

    @property
    def next_due(self) -> float | None:
        """When the first sleeper wakes; None if nobody sleeps."""
        return min((due for due, _, wake in self._sleepers if not wake.done()), default=None)
