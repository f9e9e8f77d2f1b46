"""The pool over fake replicas: what it promises when they answer, fail, refuse, hang and come back. Time stands still
unless a test advances it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from structlog.testing import capture_logs

from engine.errors import (
    Absent,
    RecipeError,
    TeacherMismatch,
    TeacherOverloaded,
    TeacherRefused,
    TeacherUnavailable,
)
from engine.recipe import HttpTeacher
from teacher.pool import PoolStatistics, ReplicaPool, ReplicaStatistics, connect
from teacher.protocol import Scores
from tests.support.clock import ManualClock, Settle
from tests.support.clock import settle as settle_loop
from tests.support.replicas import INFO, OTHER_MODEL, FakeReplica

Lines = list[Any]
DOWN = TeacherUnavailable("connection refused")


def config(**fields: Any) -> HttpTeacher:
    """Round times: back-off 1 s, deadline 100 s, a probe every 4 s (3 to 5 with jitter)."""
    times: dict[str, Any] = {"deadline_s": 100.0, "backoff_s": 1.0, "max_backoff_s": 8.0, "probe_every_s": 4.0}
    # What a self-test says and what follows from it: ``test_self_test``.
    return HttpTeacher(urls=("http://nowhere",), self_test_bound=None, **{**times, **fields})


@asynccontextmanager
async def pool_of(clock: ManualClock, *replicas: FakeReplica, **fields: Any) -> AsyncIterator[ReplicaPool]:
    """A pool over replicas named a, b, c, …; at the end it is closed, and then nothing of it may be left."""
    before = asyncio.all_tasks()
    pool = ReplicaPool(
        replicas=dict(zip("abcdef", replicas, strict=False)),
        config=config(**fields),
        clock=clock,
        rng=random.Random(0),
    )
    try:
        yield pool
    finally:
        await pool.close()
        await settle_loop()
    # Asked for before the close by the test, and ended by it.
    assert {task for task in asyncio.all_tasks() if task.get_name().startswith("teacher.")} <= before
    assert all(replica.in_flight == 0 for replica in pool.statistics().replicas)
    assert pool.statistics().num_open == pool.statistics().num_waiting == 0


def ask(pool: ReplicaPool, number: int = 7, **fields: Any) -> asyncio.Task[Scores]:
    task = asyncio.create_task(pool.score(**{"prompt_ids": (1,), "response_ids": (number,), "top_k": 2, **fields}))
    # Some tests look at one score of several: the errors of the others count as seen.
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task


async def warm(pool: ReplicaPool, *replicas: FakeReplica) -> None:
    """Have all replicas probed, and one asked."""
    before = [replica.default for replica in replicas]
    for replica in replicas:
        replica.default = None
    await ask(pool)
    await settle_loop()
    for replica, default in zip(replicas, before, strict=True):
        replica.default = default
        replica.calls.clear()


def number_in(scores: Scores) -> int:
    return -int(scores.sampled_logprobs[0])


def of(pool: ReplicaPool, name: str) -> ReplicaStatistics:
    (found,) = (replica for replica in pool.statistics().replicas if replica.name == name)
    return found


def named(lines: Lines, event: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"] == event]


@pytest.fixture
def lines() -> Iterator[Lines]:
    with capture_logs() as captured:
        yield captured


# The ordinary path


async def test_a_score_is_what_a_replica_answers(clock: ManualClock) -> None:
    async with pool_of(clock, FakeReplica()) as pool:
        scores = await pool.score(prompt_ids=(1,), response_ids=(5, 6, 9), top_k=3)

        np.testing.assert_array_equal(scores.sampled_logprobs, [-5, -6, -9])
        assert scores.top_ids.shape == (3, 3)
        assert pool.statistics() == PoolStatistics(
            replicas=(
                ReplicaStatistics(
                    name="a",
                    state="closed",
                    reason="ready",
                    in_flight=0,
                    successes_total=1,
                    failures_total=0,
                    overloads_total=0,
                    latency_s=0.0,
                    opened_total=0,
                ),
            ),
            num_open=0,
            num_waiting=0,
            num_parked=0,
            retries_total=0,
            hedges_total=0,
            hedge_wins_total=0,
            parked_s=0.0,
        )


async def test_every_score_has_an_id_of_its_own_and_the_callers_id_is_kept(clock: ManualClock) -> None:
    replica, other = FakeReplica(), FakeReplica()
    async with pool_of(clock, replica) as pool:
        for _ in range(3):
            await ask(pool)
        await ask(pool, request_id="run-12")
    async with pool_of(clock, other) as twin:
        for _ in range(3):
            await ask(twin)

    ids = [call.request_id for call in replica.calls + other.calls]
    assert len(set(ids)) == 7, "two pools with one seed must not share ids"
    assert ids[3] == "run-12"


async def test_requests_go_to_the_replica_with_the_fewest_in_flight(clock: ManualClock, settle: Settle) -> None:
    replicas = [FakeReplica(default="held") for _ in range(3)]
    async with pool_of(clock, *replicas) as pool:
        await warm(pool, *replicas)
        scores = [ask(pool, number) for number in range(7)]
        await settle()
        assert [len(replica.open_calls) for replica in replicas] == [3, 2, 2]

        replicas[2].open_calls[0].answer()
        await settle()
        scores.append(ask(pool, 7))
        await settle()

        assert [len(replica.open_calls) for replica in replicas] == [3, 2, 2]
        assert replicas[2].open_calls[-1].response_ids == (7,)
        for replica in replicas:
            for call in replica.open_calls:
                call.answer()
        assert [number_in(score) for score in await asyncio.gather(*scores)] == list(range(8))


async def test_the_faster_of_two_idle_replicas_is_asked(clock: ManualClock, settle: Settle) -> None:
    slow, fast = FakeReplica(default="held"), FakeReplica(default="held")
    async with pool_of(clock, slow, fast) as pool:
        await warm(pool, slow, fast)
        scores = [ask(pool), ask(pool)]
        await clock.advance(1.0)
        fast.open_calls[0].answer()
        await clock.advance(9.0)
        slow.open_calls[0].answer()
        await asyncio.gather(*scores)

        scores.append(ask(pool))
        await settle()

        assert len(fast.open_calls) == 1
        assert (of(pool, "a").latency_s, of(pool, "b").latency_s) == (0.2 * 10.0, 1.0)
        fast.open_calls[0].answer()
        await scores[-1]


async def test_what_finds_no_room_waits_first_come_first_served(clock: ManualClock, settle: Settle) -> None:
    replica = FakeReplica(default="held")
    async with pool_of(clock, replica, max_in_flight=2) as pool:
        scores = [ask(pool, number) for number in range(6)]
        await settle()
        assert pool.statistics().num_waiting == 4
        seen = []
        while replica.open_calls:
            call = replica.open_calls[-1]
            seen.append(call.response_ids[0])
            call.answer()
            await settle()

        assert seen == [1, 2, 3, 4, 5, 0]
        assert replica.peak_in_flight == 2
        await asyncio.gather(*scores)


async def test_a_newcomer_does_not_overtake_those_who_wait(clock: ManualClock, settle: Settle) -> None:
    replica = FakeReplica(default="held")
    async with pool_of(clock, replica, max_in_flight=1) as pool:
        first, second = ask(pool, 1), ask(pool, 2)
        await settle()
        replica.open_calls[0].answer()
        third = ask(pool, 3)
        await settle()

        assert replica.open_calls[0].response_ids == (2,)
        for score in (second, third):
            replica.open_calls[0].answer()
            await score
        await first


# Failures and retries


async def test_a_failed_attempt_is_repeated_under_the_same_id(clock: ManualClock, settle: Settle, lines: Lines) -> None:
    replica = FakeReplica()
    replica.script.extend([DOWN, DOWN])
    async with pool_of(clock, replica) as pool:
        score = ask(pool, request_id="run-1")
        await settle()
        assert len(replica.calls) == 1, "not before the back-off is over"

        await clock.advance(3.0)

        assert number_in(await score) == 7
        assert [call.request_id for call in replica.calls] == ["run-1"] * 3
        retries = named(lines, "teacher.retried")
        assert [(line["attempt"], line["request_id"], line["reason"]) for line in retries] == [
            (2, "run-1", "connection refused"),
            (3, "run-1", "connection refused"),
        ]
        assert 0 <= retries[0]["delay_s"] <= 1.0
        assert 0 <= retries[1]["delay_s"] <= 2.0
        assert pool.statistics().retries_total == 2
        assert (of(pool, "a").successes_total, of(pool, "a").failures_total) == (1, 2)


async def test_an_attempt_ends_at_its_deadline_and_the_next_one_has_its_own(clock: ManualClock, settle: Settle) -> None:
    replica = FakeReplica(default="held")
    async with pool_of(clock, replica) as pool:
        score = ask(pool)
        await clock.advance(99.9)
        assert replica.calls[0].is_open

        await clock.advance(0.1)
        assert replica.calls[0].is_cancelled
        await clock.advance(1.0)

        assert len(replica.calls) == 2
        await clock.advance(98.0)
        replica.calls[1].answer()
        assert number_in(await score) == 7
        assert of(pool, "a").failures_total == 1


async def test_a_refusal_of_the_request_is_raised_and_does_not_count_against_the_replica(clock: ManualClock) -> None:
    replica = FakeReplica(default=TeacherRefused("too long", status=413))
    async with pool_of(clock, replica, breaker_failures=1) as pool:
        for _ in range(3):
            with pytest.raises(TeacherRefused, match="too long"):
                await ask(pool)

        assert (of(pool, "a").state, of(pool, "a").failures_total) == ("closed", 0)
        assert len(replica.calls) == 3, "asked once each"


async def test_what_the_pool_does_not_know_goes_up_unchanged(clock: ManualClock) -> None:
    replica = FakeReplica()
    replica.script.append(LookupError("a bug"))
    async with pool_of(clock, replica) as pool:
        with pytest.raises(LookupError, match="a bug"):
            await ask(pool)

        assert number_in(await ask(pool)) == 7
        assert of(pool, "a").in_flight == 0


async def test_an_overloaded_replica_is_left_alone_for_as_long_as_it_asked(
    clock: ManualClock, settle: Settle, lines: Lines
) -> None:
    replica = FakeReplica()
    replica.script.append(TeacherOverloaded("429", retry_after_s=5.0))
    async with pool_of(clock, replica, breaker_failures=1) as pool:
        scores = [ask(pool, 1), ask(pool, 2), ask(pool, 3)]
        await settle()
        num_before = len(replica.calls)
        await clock.advance(4.9)
        assert len(replica.calls) == num_before

        await clock.advance(1.1)  # at most backoff_s of jitter

        assert [number_in(score) for score in await asyncio.gather(*scores)] == [1, 2, 3]
        assert (of(pool, "a").state, of(pool, "a").overloads_total, of(pool, "a").failures_total) == ("closed", 1, 0)
        assert not named(lines, "teacher.parked")


async def test_an_overload_sends_the_request_to_another_replica_at_once(clock: ManualClock) -> None:
    full, idle = FakeReplica(default=TeacherOverloaded("429", retry_after_s=30.0)), FakeReplica()
    async with pool_of(clock, full, idle) as pool:
        assert number_in(await ask(pool)) == 7

        assert (len(full.calls), len(idle.calls)) == (1, 1)
        await ask(pool)
        assert len(full.calls) == 1, "it rests"


async def test_a_replica_that_bears_less_than_the_recipe_allows_is_not_overloaded_again_and_again(
    clock: ManualClock, settle: Settle
) -> None:
    replica = FakeReplica(default="held")
    replica.script.extend(["held", "held", TeacherOverloaded("429", retry_after_s=1.0)])
    async with pool_of(clock, replica, max_in_flight=3) as pool:
        scores = [ask(pool, number) for number in range(6)]
        await clock.advance(2.0)

        while replica.open_calls:
            assert len(replica.open_calls) <= 2
            replica.open_calls[0].answer()
            await settle()

        await asyncio.gather(*scores)
        assert of(pool, "a").overloads_total == 1


# The breaker and its probes


async def test_failures_in_a_row_take_a_replica_out_until_a_probe_succeeds(
    clock: ManualClock, settle: Settle, lines: Lines
) -> None:
    bad, good = FakeReplica(default=DOWN), FakeReplica()
    async with pool_of(clock, bad, good, breaker_failures=2) as pool:
        await clock.advance(0.0)
        scores = [ask(pool, number) for number in range(8)]
        await clock.advance(30.0)
        assert [number_in(score) for score in await asyncio.gather(*scores)] == list(range(8))
        assert of(pool, "a").opened_total >= 1

        bad.default = None
        await clock.advance(6.0)
        await asyncio.gather(*(ask(pool) for _ in range(4)))

        assert of(pool, "a").state == "closed"
        states = [line["state"] for line in named(lines, "teacher.replica_changed") if line["replica"] == "a"]
        assert states[:4] == ["closed", "suspect", "closed", "open"] or states[:3] == ["closed", "suspect", "open"]
        assert states[-2:] == ["half_open", "closed"]


async def test_a_probe_comes_every_few_seconds_and_no_request_is_risked_meanwhile(
    clock: ManualClock, settle: Settle
) -> None:
    dead, good = FakeReplica(), FakeReplica()
    dead.is_up = False
    async with pool_of(clock, dead, good, breaker_failures=1) as pool:
        for _ in range(40):
            await ask(pool)
            await clock.advance(1.0)

        assert 40 / 5 <= dead.num_probes <= 1 + 40 / 3
        assert dead.calls == []
        assert of(pool, "a").state == "open"


async def test_a_half_open_replica_gets_one_trial_and_the_rest_wait_for_its_end(
    clock: ManualClock, settle: Settle
) -> None:
    replica = FakeReplica(default="held")
    async with pool_of(clock, replica, breaker_failures=1) as pool:
        scores = [ask(pool, number) for number in range(4)]
        await settle()
        replica.die()
        await settle()
        replica.revive()
        before = len(replica.calls)

        await clock.advance(9.0)

        assert of(pool, "a").state == "half_open"
        assert len(replica.calls) == before + 1
        replica.open_calls[0].answer()
        await settle()
        assert of(pool, "a").state == "closed"
        assert len(replica.open_calls) == 3
        for call in replica.open_calls:
            call.answer()
        assert [number_in(score) for score in await asyncio.gather(*scores)] == [0, 1, 2, 3]


async def test_a_failed_trial_takes_the_replica_out_again_until_the_next_probe(
    clock: ManualClock, settle: Settle
) -> None:
    replica = FakeReplica(default=TeacherUnavailable("500"))
    async with pool_of(clock, replica, breaker_failures=1) as pool:
        score = ask(pool)

        await clock.advance(100.0)

        assert len(replica.calls) <= 1 + 100 / 3, "no more than one trial per probe"
        assert len(replica.calls) >= 5
        replica.default = None
        await clock.advance(20.0)
        assert number_in(await score) == 7


async def test_a_request_from_before_the_readmission_says_nothing_about_the_trial(
    clock: ManualClock, settle: Settle
) -> None:
    replica = FakeReplica(default="held")
    async with pool_of(clock, replica, breaker_failures=1) as pool:
        old, other = ask(pool, 1), ask(pool, 2)
        await settle()
        replica.calls[0].fail(DOWN)
        await clock.advance(9.0)
        assert of(pool, "a").state == "half_open"

        replica.calls[1].fail(DOWN)
        await settle()

        assert of(pool, "a").state == "half_open"
        await clock.advance(9.0)
        for _ in range(2):
            for call in replica.open_calls:
                call.answer()
            await clock.advance(9.0)
        assert (number_in(await old), number_in(await other)) == (1, 2)


async def test_a_probe_that_hangs_is_a_failed_probe(clock: ManualClock, settle: Settle, lines: Lines) -> None:
    class Hanging(FakeReplica):
        async def ready(self) -> bool:
            self.num_probes += 1
            never: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            return await never

    replica = Hanging()
    async with pool_of(clock, replica, breaker_failures=2) as pool:
        score = ask(pool)

        await clock.advance(26.0)

        assert of(pool, "a").state == "open"
        assert of(pool, "a").reason == "a does not answer a health probe"
        score.cancel()


async def test_a_poisonous_request_does_not_keep_the_others_from_being_answered(
    clock: ManualClock, settle: Settle
) -> None:
    class Allergic(FakeReplica):
        """Fails whenever it is asked about token 13."""

        async def score(self, **fields: Any) -> Scores:
            self.script.clear()
            if fields["response_ids"] == (13,):
                self.script.append(TeacherUnavailable("500"))
            return await super().score(**fields)

    async with pool_of(clock, Allergic(), breaker_failures=2) as pool:
        poison = ask(pool, 13)
        for number in range(20, 40):
            score = ask(pool, number)
            await clock.advance(60.0)
            assert number_in(score.result()) == number

        assert not poison.done(), "nothing is skipped"
        poison.cancel()


# Refusals that speak of the replica


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_replica_with_the_wrong_token_is_taken_out_and_the_request_goes_to_another(
    status: int, clock: ManualClock, lines: Lines
) -> None:
    wrong, right = FakeReplica(default=TeacherRefused("not you", status=status)), FakeReplica()
    async with pool_of(clock, wrong, right) as pool:
        assert number_in(await ask(pool)) == 7

        assert (of(pool, "a").state, of(pool, "a").reason) == ("open", "not you")
        assert [number_in(await ask(pool, number)) for number in range(3)] == [0, 1, 2]
        assert len(wrong.calls) == 1
        wrong.default = None
        await clock.advance(6.0)
        await asyncio.gather(ask(pool), ask(pool))
        assert of(pool, "a").state == "closed"


async def test_a_refusal_by_every_replica_is_raised_also_to_those_who_wait(clock: ManualClock) -> None:
    replicas = [FakeReplica(default=TeacherRefused("wrong token", status=401)) for _ in range(2)]
    async with pool_of(clock, *replicas, max_in_flight=1) as pool:
        scores = [ask(pool, number) for number in range(5)]

        outcomes = await asyncio.gather(*scores, return_exceptions=True)

        assert [type(outcome) for outcome in outcomes] == [TeacherRefused] * 5
        with pytest.raises(TeacherRefused, match="every teacher replica refuses: wrong token") as raised:
            await ask(pool)
        assert raised.value.status == 401
        assert sum(len(replica.calls) for replica in replicas) == 2


async def test_while_one_replica_refuses_and_the_other_is_away_the_request_waits(
    clock: ManualClock, lines: Lines
) -> None:
    wrong, away = FakeReplica(default=TeacherRefused("wrong token", status=401)), FakeReplica()
    wrong.info_error = TeacherRefused("wrong token", status=401)
    async with pool_of(clock, away, wrong) as pool:
        await ask(pool)
        away.die()
        score = ask(pool)
        await clock.advance(60.0)
        assert not score.done()
        assert len(named(lines, "teacher.parked")) == 1

        away.revive()
        await clock.advance(9.0)

        assert number_in(await score) == 7


# Another model


async def test_a_replica_that_comes_back_with_another_model_is_not_asked(
    clock: ManualClock, settle: Settle, lines: Lines
) -> None:
    replica = FakeReplica(default="held")
    async with pool_of(clock, replica) as pool:
        score = ask(pool)
        await settle()
        replica.die()
        replica.revive(OTHER_MODEL)

        await clock.advance(60.0)

        assert len(replica.calls) == 1
        assert of(pool, "a").state == "rejected"
        (line,) = named(lines, "teacher.replica_rejected")
        assert (line["replica"], line["reason"]) == (
            "a",
            "weights_fingerprint is 'bbbb', the other replicas have 'aaaa'",
        )
        assert len(named(lines, "teacher.parked")) == 1

        replica.die()
        replica.revive(INFO)
        await clock.advance(6.0)
        replica.open_calls[0].answer()
        assert number_in(await score) == 7


async def test_one_lost_request_is_enough_for_a_look_at_the_model(clock: ManualClock, settle: Settle) -> None:
    """A service that was restarted fails what was open, perhaps one request; the next must not reach a stranger."""
    a, b = FakeReplica(default="held"), FakeReplica()
    async with pool_of(clock, a, b, breaker_failures=5) as pool:
        score = ask(pool)
        await settle()
        a.die()
        a.revive(OTHER_MODEL)

        await clock.advance(1.0)

        assert number_in(await score) == 7
        assert len(a.calls) == 1
        assert of(pool, "a").state == "rejected"


async def test_replicas_that_differ_from_the_beginning_are_refused(clock: ManualClock) -> None:
    async with pool_of(clock, FakeReplica(), FakeReplica(info=OTHER_MODEL)) as pool:
        with pytest.raises(
            TeacherMismatch, match=r"replicas a and b differ: at the second, weights_fingerprint is 'bbbb'"
        ):
            await pool.info()


async def test_info_needs_one_replica_that_answers(clock: ManualClock) -> None:
    away, here = FakeReplica(), FakeReplica()
    away.is_up = False
    async with pool_of(clock, away, here) as pool:
        assert await pool.info() == INFO
        here.is_up = False
        assert await pool.info() == INFO, "known by now"


async def test_info_without_any_replica_says_why(clock: ManualClock) -> None:
    away, wrong = FakeReplica(), FakeReplica()
    away.is_up = False
    async with pool_of(clock, away) as pool:
        with pytest.raises(TeacherUnavailable, match="a is not ready"):
            await pool.info()
    wrong.info_error = TeacherRefused("wrong token", status=401)
    async with pool_of(clock, away, wrong) as pool:
        with pytest.raises(TeacherRefused, match="wrong token"):
            await pool.info()
    async with pool_of(clock, away, away) as pool:
        with pytest.raises(TeacherUnavailable, match="no teacher replica answers: a is not ready; b is not ready"):
            await pool.info()


# Hedging


async def test_a_slow_request_is_asked_elsewhere_under_the_same_id_and_the_first_answer_wins(
    clock: ManualClock, settle: Settle, lines: Lines
) -> None:
    slow, quick = FakeReplica(default="held"), FakeReplica(default="held")
    async with pool_of(clock, slow, quick, hedge_after_s=3.0) as pool:
        score = ask(pool, request_id="run-1")
        await clock.advance(2.9)
        assert quick.calls == []

        await clock.advance(0.1)
        assert [call.request_id for call in slow.calls + quick.calls] == ["run-1", "run-1"]
        quick.calls[0].answer()

        assert number_in(await score) == 7
        await settle()
        assert slow.calls[0].is_cancelled
        assert of(pool, "a").in_flight == of(pool, "b").in_flight == 0
        assert of(pool, "a").failures_total == 0, "slow is not broken"
        statistics = pool.statistics()
        assert (statistics.hedges_total, statistics.hedge_wins_total, statistics.retries_total) == (1, 1, 0)
        (line,) = named(lines, "teacher.hedged")
        assert (line["request_id"], line["replica"], line["second"], line["after_s"]) == ("run-1", "a", "b", 3.0)


async def test_the_first_replica_may_still_win(clock: ManualClock, settle: Settle) -> None:
    slow, slower = FakeReplica(default="held"), FakeReplica(default="held")
    async with pool_of(clock, slow, slower, hedge_after_s=3.0) as pool:
        score = ask(pool)
        await clock.advance(5.0)

        slow.calls[0].answer()

        assert number_in(await score) == 7
        await settle()
        assert slower.calls[0].is_cancelled
        assert of(pool, "b").in_flight == 0
        assert (pool.statistics().hedges_total, pool.statistics().hedge_wins_total) == (1, 0)


@pytest.mark.parametrize("first_to_fail", [0, 1])
async def test_when_one_of_two_fails_the_other_one_decides(
    first_to_fail: int, clock: ManualClock, settle: Settle
) -> None:
    replicas = [FakeReplica(default="held"), FakeReplica(default="held")]
    async with pool_of(clock, *replicas, hedge_after_s=3.0) as pool:
        score = ask(pool)
        await clock.advance(5.0)
        replicas[first_to_fail].calls[0].fail(DOWN)
        await settle()
        assert not score.done()

        replicas[1 - first_to_fail].calls[0].answer()

        assert number_in(await score) == 7
        assert pool.statistics().retries_total == 0


@pytest.mark.parametrize("first_to_fail", [0, 1])
async def test_when_both_fail_that_is_one_failed_attempt(
    first_to_fail: int, clock: ManualClock, settle: Settle
) -> None:
    replicas = [FakeReplica(default="held"), FakeReplica(default="held")]
    async with pool_of(clock, *replicas, hedge_after_s=3.0) as pool:
        score = ask(pool)
        await clock.advance(5.0)
        for replica in replicas[:: 1 if first_to_fail == 0 else -1]:
            replica.calls[0].fail(DOWN)
            await settle()

        assert pool.statistics().retries_total == 1
        for replica in replicas:
            replica.default = None
        await clock.advance(2.0)
        assert number_in(await score) == 7


@pytest.mark.parametrize("refusing", [0, 1])
async def test_a_refusal_of_the_request_by_either_replica_is_final(
    refusing: int, clock: ManualClock, settle: Settle
) -> None:
    replicas = [FakeReplica(default="held"), FakeReplica(default="held")]
    async with pool_of(clock, *replicas, hedge_after_s=3.0) as pool:
        score = ask(pool)
        await clock.advance(5.0)

        replicas[refusing].calls[0].fail(TeacherRefused("too long", status=413))

        with pytest.raises(TeacherRefused, match="too long"):
            await score
        await settle()
        assert replicas[1 - refusing].calls[0].is_cancelled


async def test_there_is_no_hedge_without_another_healthy_replica_that_has_room(
    clock: ManualClock, settle: Settle
) -> None:
    slow, dead = FakeReplica(default="held"), FakeReplica()
    dead.is_up = False
    async with pool_of(clock, slow, hedge_after_s=3.0) as pool:
        alone = ask(pool)
        await clock.advance(50.0)
        assert len(slow.calls) == 1
        alone.cancel()
    slow = FakeReplica(default="held")
    async with pool_of(clock, slow, dead, hedge_after_s=3.0) as pool:
        score = ask(pool)
        await clock.advance(50.0)
        assert (len(slow.calls), len(dead.calls)) == (1, 0)
        score.cancel()
    a, b = FakeReplica(default="held"), FakeReplica(default="held")
    async with pool_of(clock, a, b, hedge_after_s=3.0, max_in_flight=1) as pool:
        scores = [ask(pool), ask(pool)]
        await clock.advance(50.0)
        assert (len(a.calls), len(b.calls)) == (1, 1)
        assert pool.statistics().hedges_total == 0
        for score in scores:
            score.cancel()


async def test_the_deadline_of_the_first_replica_leaves_the_second_its_own(clock: ManualClock) -> None:
    a, b = FakeReplica(default="held"), FakeReplica(default="held")
    async with pool_of(clock, a, b, hedge_after_s=60.0) as pool:
        score = ask(pool)
        await clock.advance(120.0)
        assert a.calls[0].is_cancelled
        assert b.calls[0].is_open

        b.calls[0].answer()

        assert number_in(await score) == 7
        assert of(pool, "a").failures_total == 1


# Parking


async def test_while_every_replica_is_away_scores_wait_and_the_log_says_so_once(
    clock: ManualClock, settle: Settle, lines: Lines
) -> None:
    a, b = FakeReplica(default="held"), FakeReplica(default="held")
    async with pool_of(clock, a, b) as pool:
        await warm(pool, a, b)
        scores = [ask(pool, number) for number in range(10)]
        await settle()
        a.die()
        b.die()
        await settle()
        assert pool.statistics().num_parked == 10
        assert [line["num_parked"] for line in named(lines, "teacher.parked")] == [10]
        num_retries = pool.statistics().retries_total
        late = ask(pool, 10)

        await clock.advance(1000.0)

        assert pool.statistics().retries_total == num_retries, "who waits does not knock"
        assert a.num_probes <= 3 + 1000 / 3
        assert len(named(lines, "teacher.parked")) == 1
        assert pool.statistics().num_parked == 11
        assert pool.statistics().parked_s == pytest.approx(1000.0)

        a.revive()
        a.default = None
        await clock.advance(6.0)

        assert [number_in(score) for score in await asyncio.gather(*scores, late)] == list(range(11))
        (line,) = named(lines, "teacher.resumed")
        assert 1000.0 < line["parked_s"] <= 1005.0
        assert pool.statistics().parked_s == pytest.approx(line["parked_s"], abs=1e-3)
        assert pool.statistics().num_parked == 0


async def test_a_run_may_start_before_its_teacher(clock: ManualClock, lines: Lines) -> None:
    replica = FakeReplica()
    replica.is_up = False
    async with pool_of(clock, replica) as pool:
        score = ask(pool)
        await clock.advance(60.0)
        assert len(named(lines, "teacher.parked")) == 1

        replica.revive()
        await clock.advance(6.0)

        assert number_in(await score) == 7


async def test_nobody_is_parked_while_one_replica_answers(clock: ManualClock, lines: Lines) -> None:
    dead, alive = FakeReplica(), FakeReplica()
    dead.is_up = False
    async with pool_of(clock, dead, alive) as pool:
        for _ in range(5):
            await ask(pool)
            await clock.advance(10.0)

    assert not named(lines, "teacher.parked")


# Cancelling and closing


Moment = Callable[[ReplicaPool, ManualClock, FakeReplica, FakeReplica], Awaitable[asyncio.Task[Scores]]]
"""Asks for the score of token 100 and returns when it is just there. Replicas hold, one request at a time each."""


async def until(condition: Callable[[], bool]) -> None:
    """Stop between two turns, where ``settle`` would go on to the end of all."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not come to this")


async def running(pool: ReplicaPool, clock: ManualClock, a: FakeReplica, b: FakeReplica) -> asyncio.Task[Scores]:
    score = ask(pool, 100)
    await clock.advance(1.0)
    assert a.open_calls[0].response_ids == (100,)
    return score


async def waiting(pool: ReplicaPool, clock: ManualClock, a: FakeReplica, b: FakeReplica) -> asyncio.Task[Scores]:
    score = [ask(pool, number) for number in (1, 2, 100)][-1]
    await clock.advance(1.0)
    assert pool.statistics().num_waiting == 1
    return score


async def given_a_place(pool: ReplicaPool, clock: ManualClock, a: FakeReplica, b: FakeReplica) -> asyncio.Task[Scores]:
    score = await waiting(pool, clock, a, b)
    b.open_calls[0].answer()
    await until(lambda: pool.statistics().num_waiting == 0)
    assert b.open_calls == [], "has the place and has not used it yet"
    return score


async def hedged(pool: ReplicaPool, clock: ManualClock, a: FakeReplica, b: FakeReplica) -> asyncio.Task[Scores]:
    score = ask(pool, 100)
    await clock.advance(5.0)
    assert len(a.open_calls) == len(b.open_calls) == 1
    return score


async def about_to_be_hedged(
    pool: ReplicaPool, clock: ManualClock, a: FakeReplica, b: FakeReplica
) -> asyncio.Task[Scores]:
    score = ask(pool, 100)
    passing = asyncio.create_task(clock.advance(3.0))
    await until(lambda: any(task.get_name() == "teacher.hedge" for task in asyncio.all_tasks()))
    passing.cancel()
    assert b.open_calls == [], "the task of the hedge has not had its first step"
    return score


async def left_to_the_hedge(
    pool: ReplicaPool, clock: ManualClock, a: FakeReplica, b: FakeReplica
) -> asyncio.Task[Scores]:
    score = await hedged(pool, clock, a, b)
    a.open_calls[0].fail(DOWN)
    await settle_loop()
    assert len(b.open_calls) == 1
    return score


async def backing_off(pool: ReplicaPool, clock: ManualClock, a: FakeReplica, b: FakeReplica) -> asyncio.Task[Scores]:
    score = await running(pool, clock, a, b)
    a.open_calls[0].fail(DOWN)
    await settle_loop()
    assert pool.statistics().retries_total == 1
    assert a.open_calls == b.open_calls == []
    return score


async def parked(pool: ReplicaPool, clock: ManualClock, a: FakeReplica, b: FakeReplica) -> asyncio.Task[Scores]:
    score = ask(pool, 100)
    a.die()
    b.die()
    await clock.advance(60.0)
    assert pool.statistics().num_parked == 1
    return score


MOMENTS: list[Moment] = [
    running,
    waiting,
    given_a_place,
    hedged,
    about_to_be_hedged,
    left_to_the_hedge,
    backing_off,
    parked,
]


@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_score_that_is_cancelled_leaves_nothing_behind(moment: Moment, clock: ManualClock) -> None:
    a, b = FakeReplica(default="held"), FakeReplica(default="held")
    async with pool_of(clock, a, b, max_in_flight=1, hedge_after_s=3.0) as pool:
        await warm(pool, a, b)
        score = await moment(pool, clock, a, b)

        score.cancel()
        await settle_loop()

        assert score.cancelled()
        assert (100,) not in [call.response_ids for call in a.open_calls + b.open_calls]
        for replica in (a, b):
            replica.revive()
            replica.default = None
            for call in replica.open_calls:
                call.answer()
        others = [ask(pool, number) for number in range(6)]
        await clock.advance(60.0)
        assert [number_in(other.result()) for other in others] == list(range(6))
        assert pool.statistics().num_open == 0
        assert [replica.in_flight for replica in pool.statistics().replicas] == [0, 0]


@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_score_that_is_open_when_the_pool_closes_is_told_so(moment: Moment, clock: ManualClock) -> None:
    a, b = FakeReplica(default="held"), FakeReplica(default="held")
    async with pool_of(clock, a, b, max_in_flight=1, hedge_after_s=3.0) as pool:
        await warm(pool, a, b)
        score = await moment(pool, clock, a, b)

        await pool.close()

        with pytest.raises(TeacherUnavailable, match="the teacher pool is closed"):
            await score


async def test_a_cancelled_score_gives_its_turn_to_the_next(clock: ManualClock, settle: Settle) -> None:
    replica = FakeReplica(default="held")
    async with pool_of(clock, replica, max_in_flight=1) as pool:
        scores = [ask(pool, number) for number in range(3)]
        await settle()
        scores[1].cancel()
        await settle()

        scores[0].cancel()
        await settle()

        assert replica.open_calls[0].response_ids == (2,)
        replica.open_calls[0].answer()
        assert number_in(await scores[2]) == 2


async def test_close_ends_open_scores_closes_replicas_and_may_be_repeated(clock: ManualClock, settle: Settle) -> None:
    replica = FakeReplica(default="held")
    async with pool_of(clock, replica) as pool:
        score = ask(pool)
        await settle()

        await asyncio.gather(pool.close(), pool.close())
        await pool.close()

        assert replica.is_closed
        for late in (score, ask(pool)):
            with pytest.raises(TeacherUnavailable, match="the teacher pool is closed"):
                await late
        with pytest.raises(TeacherUnavailable, match="the teacher pool is closed"):
            await pool.info()
        assert repr(pool) == "<ReplicaPool closed: a closed>"


async def test_a_pool_that_was_never_used_closes(clock: ManualClock) -> None:
    replica = FakeReplica()
    async with pool_of(clock, replica):
        pass

    assert replica.is_closed


async def test_a_fault_in_a_prober_ends_the_scores_instead_of_leaving_them_to_wait(
    clock: ManualClock, settle: Settle
) -> None:
    replica = FakeReplica()
    replica.info_error = LookupError("a bug")
    async with pool_of(clock, replica) as pool:
        with pytest.raises(RuntimeError, match="the teacher pool's own task failed: LookupError"):
            await ask(pool)
        with pytest.raises(RuntimeError, match="LookupError"):
            await ask(pool)


# From the recipe


def test_connect_refuses_a_token_file_that_cannot_be_used(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\nsecond line\n")
    for path, kind in ((tmp_path / "missing", Absent), (empty, RecipeError), (tmp_path, RecipeError)):
        with pytest.raises(kind, match=f"token file '{path}'"):
            connect(config(token_file=str(path)))


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        (("http://a:1", "http://b:1", "http://a:1"), "teacher.urls names 'http://a:1' twice"),
        (("ftp://a:1",), "teacher.urls: .*'ftp://a:1'"),
    ],
)
def test_connect_refuses_urls_that_cannot_be_used(urls: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        connect(msgspec.structs.replace(config(), urls=urls))


async def test_connect_makes_a_replica_of_each_url(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")

    pool = connect(msgspec.structs.replace(config(token_file=str(token)), urls=("http://b:1", "http://a:1")))

    assert [replica.name for replica in pool.statistics().replicas] == ["http://a:1", "http://b:1"]
    await pool.close()


def test_a_pool_of_nothing_is_refused(clock: ManualClock) -> None:
    with pytest.raises(ValueError, match="at least one replica"):
        ReplicaPool(replicas={}, config=config(), clock=clock, rng=random.Random(0))
