"""Whatever replicas do, in whatever order: no score is lost, none gets another one's answer, none is given twice."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import TeacherOverloaded, TeacherRefused, TeacherUnavailable
from engine.recipe import HttpTeacher
from teacher.pool import ReplicaPool
from teacher.protocol import Scores
from tests.support.clock import ManualClock, settle
from tests.support.replicas import OTHER_MODEL, FakeReplica

MAX_IN_FLIGHT = 2

# (name, which: replica, open call or score, seconds)
ACTS = st.tuples(
    st.sampled_from(
        [
            "ask",
            "ask",
            "answer",
            "answer",
            "fail",
            "overload",
            "cancel",
            "kill",
            "revive",
            "revive as another model",
            "wrong token",
            "right token",
            "wait",
        ]
    ),
    st.integers(0, 63),
    st.sampled_from([0.1, 1.0, 4.0, 30.0, 120.0]),
)


class World:
    """A pool, its replicas, and every score that was ever asked for, by the token that it is about."""

    def __init__(self, *, num_replicas: int, hedge_after_s: float | None, seed: int) -> None:
        self.clock = ManualClock()
        self.replicas = [FakeReplica(default="held") for _ in range(num_replicas)]
        self.pool = ReplicaPool(
            replicas={f"r{n}": replica for n, replica in enumerate(self.replicas)},
            config=HttpTeacher(
                urls=("http://nowhere",),
                max_in_flight=MAX_IN_FLIGHT,
                deadline_s=50.0,
                hedge_after_s=hedge_after_s,
                backoff_s=0.5,
                max_backoff_s=5.0,
                breaker_failures=2,
                probe_every_s=2.0,
                self_test_bound=None,
            ),
            clock=self.clock,
            rng=random.Random(seed),
        )
        self.scores: dict[int, asyncio.Task[Scores]] = {}
        self.cancelled: set[int] = set()

    async def act(self, name: str, which: int, seconds: float) -> None:
        replica = self.replicas[which % len(self.replicas)]
        calls = [call for replica in self.replicas for call in replica.open_calls]
        call = calls[which % len(calls)] if calls else None
        match name:
            case "ask":
                number = len(self.scores)
                self.scores[number] = asyncio.create_task(
                    self.pool.score(prompt_ids=(1,), response_ids=(number,), top_k=1)
                )
            case "answer" if call is not None:
                call.answer()
            case "fail" if call is not None:
                call.fail(TeacherUnavailable("502"))
            case "overload" if call is not None:
                call.fail(TeacherOverloaded("429", retry_after_s=seconds))
            case "cancel" if self.scores:
                number = which % len(self.scores)
                if self.scores[number].cancel():
                    self.cancelled.add(number)
            case "kill":
                replica.die()
            case "revive":
                replica.die()
                replica.revive()
            case "revive as another model":
                replica.die()
                replica.revive(OTHER_MODEL)
            case "wrong token" if len(self.replicas) > 1:  # if all refused, scores would rightly fail
                self.replicas[-1].default = TeacherRefused("wrong token", status=401)
            case "right token":
                self.replicas[-1].default = "held"
            case "wait":
                await self.clock.advance(seconds)
        await settle()
        self.check()

    def check(self) -> None:
        statistics = self.pool.statistics()
        for replica, counted in zip(self.replicas, statistics.replicas, strict=True):
            assert counted.in_flight == len(replica.open_calls) <= MAX_IN_FLIGHT
            assert replica.peak_in_flight <= MAX_IN_FLIGHT
        assert statistics.num_open == sum(not score.done() for score in self.scores.values())
        for number, score in self.scores.items():
            if score.done() and number not in self.cancelled:
                assert -int(score.result().sampled_logprobs[0]) == number
        ids: dict[str, int] = {}
        for replica in self.replicas:
            for call in replica.calls:
                assert ids.setdefault(call.request_id, call.response_ids[0]) == call.response_ids[0]
        assert len(set(ids.values())) == len(ids), "one id per score"

    async def heal(self) -> None:
        for replica in self.replicas:
            replica.default = None
            replica.revive()
            for call in replica.open_calls:
                call.answer()
        await self.clock.advance(300.0)


async def live_through(acts: list[Any], **world_fields: Any) -> None:
    world = World(**world_fields)
    await world.pool.info()  # from here on the pool knows which model is the right one
    for name, which, seconds in acts:
        await world.act(name, which, seconds)

    await world.heal()

    world.check()
    assert all(score.done() for score in world.scores.values())
    for number in world.cancelled:
        score = world.scores[number]
        assert score.cancelled() or -int(score.result().sampled_logprobs[0]) == number
    statistics = world.pool.statistics()
    assert statistics.num_open == statistics.num_waiting == statistics.num_parked == 0
    await world.pool.close()
    await settle()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@settings(max_examples=60)
@given(
    acts=st.lists(ACTS, min_size=10, max_size=50),
    num_replicas=st.integers(1, 3),
    hedge_after_s=st.sampled_from([None, 3.0]),
    seed=st.integers(0, 99),
)
def test_no_order_of_faults_loses_or_doubles_an_answer(
    acts: list[Any], num_replicas: int, hedge_after_s: float | None, seed: int
) -> None:
    uvloop.run(live_through(acts, num_replicas=num_replicas, hedge_after_s=hedge_after_s, seed=seed))
