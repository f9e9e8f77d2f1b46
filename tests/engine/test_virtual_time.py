"""Time that passes only when nobody can do anything else, and everything that waits for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.actor import Worker
from engine.errors import Deadlock
from engine.transport.channel import Receiver, Sender, open_channel
from engine.virtual_time import VirtualClock, VirtualLoop, VirtualWorker, run_virtual

R = TypeVar("R")


def virtually(main: Callable[[VirtualClock], Coroutine[Any, Any, R]]) -> R:
    async def run() -> R:
        return await main(VirtualClock())

    return run_virtual(run)


def test_years_pass_at_once_and_exactly() -> None:
    async def main(clock: VirtualClock) -> float:
        for _ in range(10):
            await clock.sleep(31_557_600.0)
        return clock.now()

    assert virtually(main) == 315_576_000.0


@given(st.lists(st.integers(0, 50), max_size=20))
def test_sleepers_wake_in_the_order_of_their_times(seconds: list[int]) -> None:
    woken: list[tuple[float, float]] = []

    async def main(clock: VirtualClock) -> None:
        async def sleeper(duration: float) -> None:
            await clock.sleep(duration)
            woken.append((duration, clock.now()))

        await asyncio.gather(*(sleeper(duration) for duration in seconds))

    virtually(main)

    assert woken == sorted(woken)
    assert all(duration == now for duration, now in woken)


def test_timeouts_are_measured_in_virtual_time() -> None:
    async def main(clock: VirtualClock) -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3600.0):
                await asyncio.get_running_loop().create_future()
        return clock.now()

    assert virtually(main) == 3600.0


def test_when_everybody_waits_for_somebody_else_the_error_says_who_waits_for_what() -> None:
    async def main(clock: VirtualClock) -> None:
        ends: tuple[Sender[int], Receiver[int]] = open_channel("scored", max_items=1, clock=clock)
        sender, receiver = ends

        async def learn() -> None:
            await receiver.receive()

        await asyncio.gather(*(asyncio.create_task(learn(), name="learner") for _ in range(2)))
        sender.close()

    with pytest.raises(Deadlock, match=r"learner: .*learn > Receiver.receive \[scored\].*\(2 tasks\)"):
        virtually(main)


def test_a_watcher_sees_every_second_and_hides_no_deadlock() -> None:
    seen: list[float] = []

    async def main(clock: VirtualClock) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.watch(lambda: seen.append(clock.now()), every_s=1.0)
        await clock.sleep(3.5)
        await loop.create_future()

    with pytest.raises(Deadlock):
        virtually(main)

    assert seen == [1.0, 2.0, 3.0]


def test_time_stands_still_while_a_thread_works() -> None:
    go = threading.Event()

    async def main(clock: VirtualClock) -> tuple[str, float]:
        worker = Worker("judge")
        early = asyncio.create_task(clock.sleep(1.0))
        call = asyncio.create_task(worker.call(lambda: "worth it" if go.wait(30) else "late"))
        await asyncio.sleep(0)
        go.set()
        answer = await call
        now = clock.now()
        await early
        assert await asyncio.to_thread(lambda: 7) == 7
        await worker.close()
        return answer, now

    assert virtually(main) == ("worth it", 0.0)


def test_a_simulation_has_no_network() -> None:
    async def main(clock: VirtualClock) -> None:
        await asyncio.open_connection("127.0.0.1", 9)

    with pytest.raises(RuntimeError, match="a simulation has no network"):
        virtually(main)


def test_calls_of_a_virtual_worker_take_their_time_one_after_the_other() -> None:
    async def main(clock: VirtualClock) -> list[tuple[str, float]]:
        worker = VirtualWorker("learner")
        done = []

        async def call(name: str, seconds: float) -> None:
            await worker.call(worker.spend, seconds)
            done.append((name, clock.now()))

        await asyncio.gather(call("a", 2.0), call("b", 0.5), call("c", 0.0))
        await worker.close()
        with pytest.raises(RuntimeError, match="worker 'learner' is closed"):
            await worker.call(worker.spend, 1.0)
        return done

    assert virtually(main) == [("a", 2.0), ("b", 2.5), ("c", 2.5)]


def test_what_a_call_raises_reaches_the_caller_and_the_next_call_is_made() -> None:
    async def main(clock: VirtualClock) -> int:
        worker = VirtualWorker("learner")
        with pytest.raises(ZeroDivisionError):
            await worker.call(lambda: 1 // 0)
        return await worker.call(lambda: 3)

    assert virtually(main) == 3
