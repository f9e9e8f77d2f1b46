"""Virtual time: an event loop whose clock stands still while anything can run, and else jumps to the next timer.

Whatever waits for a ``Clock``, a timer or another task runs on it unchanged and takes no real time. Nothing here knows
what is simulated.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import selectors
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Final, ParamSpec, TypeVar

from engine.errors import Deadlock

P = ParamSpec("P")
R = TypeVar("R")

_MAX_SHOWN = 16
"""Lines of a deadlock's description."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """An asyncio loop that begins at second 0 and never waits, except for threads that work for it (``outside_work``):
    meanwhile its time stands still. It has no network.

    Raises:
        Deadlock: (from whatever runs the loop) nothing is ready, no timer is set and no thread works for it.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._num_outside = 0
        self._look: Callable[[], None] | None = None
        self._look_every_s = 0.0
        self._next_look = 0.0
        super().__init__(_Jump(self))

    def time(self) -> float:
        return self._now

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        # Most of what a simulation costs is turns of the loop, and a third of these asyncio's own call_soon.
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)  # type: ignore[attr-defined]
        return handle

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        future = super().run_in_executor(executor, func, *args)
        self._num_outside += 1
        future.add_done_callback(self._came_back)
        return future

    async def shutdown_default_executor(self, *args: Any, **kwargs: Any) -> None:
        with outside_work():
            await super().shutdown_default_executor(*args, **kwargs)

    def watch(self, look: Callable[[], None], *, every_s: float) -> None:
        """Call ``look`` whenever so much virtual time has passed. It is no timer: a deadlock stays one."""
        self._look, self._look_every_s, self._next_look = look, every_s, self._now + every_s

    def _until_next_timer(self) -> float:
        timers = self._scheduled  # type: ignore[attr-defined]
        return float(timers[0].when()) - self._now if timers else 0.0

    def _came_back(self, _: object) -> None:
        self._num_outside -= 1

    def _pass(self, seconds: float) -> None:
        until = self._now + seconds
        while self._look is not None and self._next_look <= until:
            self._now = self._next_look
            self._next_look += self._look_every_s
            self._look()
        self._now = until
        # Timers count as due within this of now. After a month a nanosecond is less than a float can tell, and a timer
        # that is due now would never be.
        self._clock_resolution = max(1e-9, 2.0 * math.ulp(until))


class _Jump(selectors.DefaultSelector):
    """Where a loop waits for sockets and timers: here time passes instead."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        if len(self.get_map()) > 0:  # the first one is the loop's own, through which threads wake it
            raise RuntimeError("a simulation has no network: its time does not wait for an answer from outside")
        return super().register(fileobj, events, data)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0:
            return []
        if self._loop._num_outside:
            return super().select(None)
        if timeout is None:
            raise Deadlock(who_waits(self._loop))
        # asyncio waits a day at most, and then looks again: years would be thousands of looks.
        self._loop._pass(max(timeout, self._loop._until_next_timer()))
        return []


class VirtualClock:
    """``Clock`` of the running ``VirtualLoop``."""

    def __init__(self) -> None:
        self._loop: Final = asyncio.get_running_loop()

    def now(self) -> float:
        return self._loop.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(max(0.0, seconds))


class VirtualWorker:
    """In a simulation what an ``engine.actor.Worker`` is in a run: calls go one after the other, in the loop itself,
    and take the virtual time that they say with ``spend``. What a call changes is changed when it begins."""

    def __init__(self, name: str) -> None:
        self.name: Final = name
        self._turn = asyncio.Lock()
        self._spent_s = 0.0
        self._is_closed = False

    def spend(self, seconds: float) -> None:
        """The call under way takes so much longer."""
        self._spent_s += seconds

    async def call(self, fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """As ``engine.actor.Worker.call``."""
        if self._is_closed:
            raise RuntimeError(f"worker {self.name!r} is closed; it cannot run {getattr(fn, '__qualname__', repr(fn))}")
        async with self._turn:
            self._spent_s = 0.0
            result = fn(*args, **kwargs)
            if self._spent_s > 0:
                await asyncio.sleep(self._spent_s)
            return result

    async def close(self) -> None:
        self._is_closed = True
        async with self._turn:
            return


def run_virtual(main: Callable[[], Coroutine[Any, Any, R]]) -> R:
    """Run ``main()`` on a virtual loop of its own and return what it returns.

    Raises:
        Deadlock: everybody waits for somebody else.
    """
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main())


@contextmanager
def outside_work() -> Iterator[None]:
    """Around the await of something that a thread will bring: a virtual loop lets no time pass meanwhile."""
    loop = asyncio.get_running_loop()
    if not isinstance(loop, VirtualLoop):
        yield
        return
    loop._num_outside += 1
    try:
        yield
    finally:
        loop._num_outside -= 1


def who_waits(loop: asyncio.AbstractEventLoop) -> str:
    """Every task of ``loop`` and the calls in which it waits, innermost last; equal ones are counted."""
    places = Counter(_place(task) for task in asyncio.all_tasks(loop) if not task.done())
    lines = [f"{place}{f' ({number} tasks)' if number > 1 else ''}" for place, number in sorted(places.items())]
    if len(lines) > _MAX_SHOWN:
        lines[_MAX_SHOWN - 1 :] = [f"and {len(lines) - _MAX_SHOWN + 1} more"]
    return "\n".join(f"  {line}" for line in lines)


def _place(task: asyncio.Task[Any]) -> str:
    calls = []
    waited: Any = task.get_coro()
    while (frame := getattr(waited, "cr_frame", None)) is not None:
        owner = getattr(frame.f_locals.get("self"), "name", None)
        calls.append(frame.f_code.co_qualname + (f" [{owner}]" if isinstance(owner, str) else ""))
        waited = waited.cr_await
    # Numbered by asyncio: such a name says nothing and would keep equal tasks apart.
    name = "" if task.get_name().startswith("Task-") else f"{task.get_name()}: "
    return name + " > ".join(calls)
