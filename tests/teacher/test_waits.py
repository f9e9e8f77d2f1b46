from __future__ import annotations

import asyncio

import pytest

from teacher.waits import Alarms, Interrupted, Scope
from tests.support.clock import ManualClock, Settle


async def wait_in(scope: Scope) -> str:
    """Why the wait ended."""
    try:
        with scope:
            await asyncio.get_running_loop().create_future()
    except Interrupted as interrupted:
        return interrupted.reason
    return "not at all"


async def test_an_interrupted_body_ends_with_the_first_reason_and_the_task_goes_on(settle: Settle) -> None:
    scope = Scope()
    task = asyncio.create_task(wait_in(scope))
    await settle()

    scope.interrupt("late")
    scope.interrupt("later")

    assert await task == "late"
    assert task.cancelling() == 0


async def test_a_cancellation_from_outside_passes_through(settle: Settle) -> None:
    task = asyncio.create_task(wait_in(Scope()))
    await settle()

    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("interrupt_first", [True, False])
async def test_a_cancellation_wins_over_an_interruption(interrupt_first: bool, settle: Settle) -> None:
    scope = Scope()
    task = asyncio.create_task(wait_in(scope))
    await settle()

    for act in (lambda: scope.interrupt("late"), task.cancel)[:: 1 if interrupt_first else -1]:
        act()

    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_interruption_before_or_after_the_body_does_nothing() -> None:
    scope = Scope()
    scope.interrupt("too early")
    with scope:
        await asyncio.sleep(0)
    scope.interrupt("too late")

    await asyncio.sleep(0)  # a cancellation would arrive here


async def test_an_error_of_the_body_passes_and_takes_the_interruption_with_it(settle: Settle) -> None:
    scope = Scope()

    async def body() -> None:
        with scope:
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                raise LookupError("while cleaning up")

    task = asyncio.create_task(body())
    await settle()

    scope.interrupt("late")

    with pytest.raises(LookupError):
        await task
    assert task.cancelling() == 0


@pytest.mark.parametrize("outer_first", [True, False])
async def test_of_two_nested_scopes_that_are_interrupted_the_outer_one_decides(
    outer_first: bool, settle: Settle
) -> None:
    outer, inner = Scope(), Scope()

    async def body() -> str:
        try:
            with outer:
                return await wait_in(inner)
        except Interrupted as interrupted:
            return interrupted.reason

    task = asyncio.create_task(body())
    await settle()

    for scope, reason in ((outer, "outer"), (inner, "inner"))[:: 1 if outer_first else -1]:
        scope.interrupt(reason)

    assert await task == "outer"
    assert task.cancelling() == 0


async def test_alarms_ring_in_order_each_after_its_own_time(clock: ManualClock, settle: Settle) -> None:
    rung: list[tuple[str, float]] = []
    alarms = Alarms[str](clock, after_s=10.0, ring=lambda item: rung.append((item, clock.now())))
    keeper = asyncio.create_task(alarms.run())
    await settle()
    alarms.set("a", clock.now())
    await clock.advance(4.0)
    alarms.set("b", clock.now())
    alarms.set("c", clock.now())
    alarms.clear("b")

    await clock.advance(20.0)

    assert rung == [("a", 10.0), ("c", 14.0)]
    alarms.set("d", clock.now())
    await clock.advance(10.0)
    assert rung[2:] == [("d", 34.0)]
    keeper.cancel()


async def test_an_alarm_cleared_at_once_wakes_nobody_again_and_again(clock: ManualClock, settle: Settle) -> None:
    rung: list[int] = []
    alarms = Alarms[int](clock, after_s=10.0, ring=rung.append)
    keeper = asyncio.create_task(alarms.run())
    await settle()

    for item in range(100):
        alarms.set(item, clock.now())
        alarms.clear(item)
        await settle()

    assert clock.num_sleeping == 1
    alarms.set(100, clock.now())
    await clock.advance(9.9)
    assert rung == []
    await clock.advance(0.1)
    assert rung == [100]
    await clock.advance(100.0)
    assert clock.num_sleeping == 0, "nothing to wait for"
    alarms.clear(100)
    keeper.cancel()
