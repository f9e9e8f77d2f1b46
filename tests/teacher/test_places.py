from __future__ import annotations

import asyncio

import pytest

from teacher.places import Places
from teacher.replica import Replica
from tests.support.clock import ManualClock, Settle


def make_places(clock: ManualClock, *, num_replicas: int = 1) -> tuple[Places, list[Replica]]:
    """Closed replicas with room for one request each."""
    replicas = [Replica(f"r{n}", max_in_flight=1, max_failures=1) for n in range(num_replicas)]
    for replica in replicas:
        replica.note("probe_ok", "ready")
    return Places(replicas, clock=clock), replicas


async def test_a_newcomer_goes_behind_those_who_wait_also_when_there_is_room(
    clock: ManualClock, settle: Settle
) -> None:
    places, (replica,) = make_places(clock)
    assert places.try_take() is replica
    waiting = asyncio.create_task(places.take())
    await settle()
    replica.in_flight -= 1  # room, and nobody has been told of it yet

    assert places.try_take() is None

    places.hand_out()
    assert await waiting is replica
    assert replica.in_flight == 1


async def test_a_second_place_is_at_another_closed_replica(clock: ManualClock) -> None:
    places, (first, second) = make_places(clock, num_replicas=2)
    assert places.has_second(first)
    assert places.try_take_second(first) is second
    assert places.try_take_second(first) is None, "no room"
    second.in_flight = 0
    second.note("failed", "gone")
    second.note("probe_ok", "ready")
    assert second.state == "half_open"

    assert places.try_take_second(first) is None, "its one trial is not for hedges"


async def test_those_who_are_sent_away_get_an_error_each(clock: ManualClock, settle: Settle) -> None:
    places, (replica,) = make_places(clock)
    places.try_take()
    waiting = [asyncio.create_task(places.take()) for _ in range(3)]
    await settle()
    waiting[1].cancel()

    places.fail_all(lambda: LookupError("go away"))

    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [LookupError, asyncio.CancelledError, LookupError]
    assert outcomes[0] is not outcomes[2]
    assert (replica.in_flight, places.num_waiting) == (1, 0)


async def test_a_place_given_to_someone_cancelled_in_the_same_turn_goes_on(clock: ManualClock, settle: Settle) -> None:
    places, (replica,) = make_places(clock)
    places.try_take()
    first, second = (asyncio.create_task(places.take()) for _ in range(2))
    await settle()

    replica.in_flight -= 1
    places.hand_out()
    first.cancel()

    assert await second is replica
    with pytest.raises(asyncio.CancelledError):
        await first
    assert replica.in_flight == 1
