"""What is told of replicas that say different things, and what follows: nothing, a warning, or their absence."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from engine.errors import TeacherOverloaded, TeacherRefused, TeacherUnavailable
from engine.recipe import HttpTeacher
from teacher.pool import ReplicaPool
from teacher.protocol import Scores
from teacher.self_test import SelfTest, distance
from tests.support.clock import ManualClock, Settle
from tests.support.replicas import INFO, FakeReplica


class Shifted(FakeReplica):
    """Its log-probabilities are off, by the next of ``shifts``, or the last."""

    def __init__(self, *shifts: float) -> None:
        super().__init__()
        self.shifts = list(shifts)

    async def score(self, **question: Any) -> Scores:
        scores = await super().score(**question)
        shift = self.shifts.pop(0) if len(self.shifts) > 1 else self.shifts[0]
        ids = np.broadcast_to(np.arange(scores.top_ids.shape[1], dtype=np.int32), scores.top_ids.shape)
        return msgspec.structs.replace(scores, top_ids=ids, top_logprobs=scores.top_logprobs + np.float32(shift))


def pool_of(clock: ManualClock, *replicas: FakeReplica, **fields: Any) -> ReplicaPool:
    return ReplicaPool(
        replicas=dict(zip("ab", replicas, strict=False)),
        config=HttpTeacher(urls=("http://nowhere",), deadline_s=10.0, probe_every_s=1.0, **fields),
        clock=clock,
        rng=random.Random(0),
    )


def states(pool: ReplicaPool) -> list[str]:
    return [replica.state for replica in pool.statistics().replicas]


def listed(logits_TV: npt.NDArray[np.float64], top_k: int) -> Scores:
    logprobs = logits_TV - np.log(np.exp(logits_TV).sum(axis=1, keepdims=True))
    ids = np.argsort(-logprobs, axis=1, kind="stable")[:, :top_k]
    return Scores(
        top_ids=ids.astype(np.int32),
        top_logprobs=np.take_along_axis(logprobs, ids, 1).astype(np.float32),
        sampled_logprobs=np.zeros(len(logits_TV), np.float32),
    )


@given(seed=st.integers(0, 2**32 - 1), noise=st.floats(0.0, 3.0), top_k=st.integers(1, 12))
def test_the_distance_is_never_more_than_the_largest_difference_of_a_logprob(
    seed: int, noise: float, top_k: int
) -> None:
    """So a replica is never accused of more than it did: the definition over the whole vocabulary is the bound."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(4, 12)) * 2
    other = logits + rng.normal(size=logits.shape) * noise
    one, two = listed(logits, top_k), listed(other, top_k)

    whole = [
        np.take_along_axis(s.top_logprobs, np.argsort(s.top_ids, 1), 1) for s in (listed(logits, 12), listed(other, 12))
    ]

    found = distance(one, two)
    assert found == distance(two, one)
    assert found <= np.abs(whole[0] - whole[1]).max() + 1e-5
    if top_k == 12:
        assert found == pytest.approx(np.abs(whole[0] - whole[1]).max(), abs=1e-5)
    if noise == 0.0:
        assert found == 0.0


async def test_a_test_asks_twice_under_ids_of_their_own_within_what_the_teacher_takes(clock: ManualClock) -> None:
    info = msgspec.structs.replace(INFO, max_length=5, max_top_k=3)
    replica = FakeReplica(info=info)

    assert await SelfTest(bound=0.1).examine("a", replica, info) is None

    assert len({call.request_id for call in replica.calls}) == 2
    assert [(len(call.response_ids), call.top_k) for call in replica.calls] == [(4, 3), (4, 3)]


@pytest.mark.parametrize(
    ("shifts", "other"), [([[0.0], [0.75]], "a"), ([[0.0], [0.0, 0.75]], None)], ids=["another build", "not itself"]
)
@pytest.mark.parametrize("action", ["warn", "refuse"])
async def test_a_replica_that_disagrees_is_told_with_numbers_and_left_out_if_the_recipe_says_so(
    clock: ManualClock, settle: Settle, shifts: Sequence[Sequence[float]], other: str | None, action: str
) -> None:
    replicas = [Shifted(*of_one) for of_one in shifts]
    with capture_logs() as lines:
        pool = pool_of(clock, *replicas, on_disagreement=action)
        await pool.score(prompt_ids=(1,), response_ids=(2,), top_k=2)
        await settle()

        told = [line for line in lines if line["event"] == "teacher.disagrees"]
        assert [(line["replica"], line["other"], line["difference"], line["bound"]) for line in told] == [
            ("b", other, 0.75, 0.5)
        ]
        assert states(pool) == (["closed", "rejected"] if action == "refuse" else ["closed", "closed"])
        for _ in range(3):
            await clock.advance(2.0)
            await settle()
        assert len([line for line in lines if line["event"] == "teacher.disagrees"]) == 1, "it is said once"
        await pool.close()


async def test_a_replica_that_comes_back_is_tested_against_what_was_said_before_it_went(
    clock: ManualClock, settle: Settle
) -> None:
    """The case without fingerprints: a stock server that was started again with another model."""
    replica = Shifted(0.0)
    pool = pool_of(clock, replica, on_disagreement="refuse")
    await pool.score(prompt_ids=(1,), response_ids=(2,), top_k=2)
    replica.script.append(TeacherUnavailable("connection reset"))
    replica.shifts = [2.0]

    waiting = asyncio.create_task(pool.score(prompt_ids=(1,), response_ids=(2,), top_k=2))
    await settle()
    assert states(pool) == ["rejected"]
    assert not waiting.done()

    replica.shifts = [0.0]
    for _ in range(4):
        await clock.advance(1.0)
        await settle()
    await waiting
    assert states(pool) == ["closed"]
    await pool.close()


async def test_a_replica_that_is_too_busy_for_a_test_is_asked_when_it_wants_to_be(
    clock: ManualClock, settle: Settle
) -> None:
    replica = FakeReplica()
    replica.script.extend([TeacherOverloaded("full", retry_after_s=3.0)] * 2)
    pool = pool_of(clock, replica)
    waiting = asyncio.create_task(pool.score(prompt_ids=(1,), response_ids=(2,), top_k=2))
    await settle()
    assert len(replica.calls) == 1

    for _ in range(2):
        await clock.advance(3.5)
        await settle()

    await waiting
    assert pool.statistics().replicas[0].opened_total == 0
    await pool.close()


async def test_a_self_test_that_is_refused_for_the_replicas_own_reasons_ends_the_wait(clock: ManualClock) -> None:
    replica = FakeReplica(default=TeacherRefused("wrong token", status=401))
    pool = pool_of(clock, replica)

    with pytest.raises(TeacherRefused, match="wrong token"):
        await pool.score(prompt_ids=(1,), response_ids=(2,), top_k=2)
    await pool.close()


async def test_a_self_test_that_hangs_is_a_probe_that_failed(clock: ManualClock, settle: Settle) -> None:
    replica = FakeReplica(default="held")
    pool = pool_of(clock, replica)
    waiting = asyncio.create_task(pool.score(prompt_ids=(1,), response_ids=(2,), top_k=2))
    await settle()
    assert states(pool) == ["suspect"]

    replica.default = None
    for _ in range(4):
        await clock.advance(6.0)
        await settle()

    await waiting
    assert replica.calls[0].is_cancelled
    await pool.close()
