"""The simulated teacher takes the time that it is said to take, and no more."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from engine.errors import TeacherUnavailable
from engine.recipe import ReplayConfig
from engine.virtual_time import VirtualClock, run_virtual
from teacher.replay import ReplayTeacher


def ends(
    costs: ReplayConfig, asks: Sequence[tuple[float, int]], *, num_replicas: int = 1, alone: bool = False
) -> list[float]:
    """When each of the (time, tokens) was answered."""

    async def main() -> list[float]:
        clock = VirtualClock()
        teacher = ReplayTeacher(costs=costs, num_replicas=num_replicas, clock=clock)

        async def ask(at: float, num_tokens: int) -> float:
            await clock.sleep(at)
            scores = await teacher.score(prompt_ids=(1,), response_ids=(1,) * (num_tokens - 1), top_k=4, alone=alone)
            assert scores.top_ids.shape == scores.top_logprobs.shape == (num_tokens - 1, 4)
            assert scores.sampled_logprobs.shape == (num_tokens - 1,)
            return clock.now()

        found = await asyncio.gather(*(ask(*one) for one in asks))
        await teacher.close()
        return list(found)

    return run_virtual(main)


SECOND_PER_TOKEN = ReplayConfig(teacher_token_s=1.0, teacher_latency_s=0.25)


def test_one_after_the_other_and_the_latency_holds_up_nobody() -> None:
    assert ends(SECOND_PER_TOKEN, [(0.0, 2), (0.0, 3), (1.0, 2), (20.0, 4)]) == [2.25, 5.25, 7.25, 24.25]


def test_replicas_share_one_queue() -> None:
    assert ends(SECOND_PER_TOKEN, [(0.0, 2), (0.0, 9), (0.0, 3)], num_replicas=2) == [2.25, 9.25, 5.25]


def test_a_replica_may_work_on_several_side_by_side() -> None:
    costs = ReplayConfig(teacher_token_s=1.0, teacher_latency_s=0.0, teacher_parallel=2)

    assert ends(costs, [(0.0, 2), (0.0, 5), (0.0, 2)]) == [2.0, 5.0, 4.0]


def test_what_comes_at_one_instant_is_scored_together_unless_it_wants_to_be_alone() -> None:
    costs = ReplayConfig(teacher_token_s=1.0, teacher_batch_s=10.0, teacher_latency_s=0.0, teacher_batch_rollouts=2)

    together = ends(costs, [(0.0, 2), (0.0, 3), (0.0, 4)])
    alone = ends(costs, [(0.0, 2), (0.0, 3)], alone=True)

    assert together == pytest.approx([15.0, 15.0, 29.0], abs=1e-5)
    assert alone == pytest.approx([12.0, 25.0], abs=1e-5)


def test_closing_tells_those_who_wait() -> None:
    async def main() -> None:
        clock = VirtualClock()
        teacher = ReplayTeacher(costs=SECOND_PER_TOKEN, num_replicas=1, clock=clock)
        first, second = (
            asyncio.create_task(teacher.score(prompt_ids=(1,), response_ids=(2,), top_k=1)) for _ in range(2)
        )
        await clock.sleep(1.0)
        await teacher.close()
        await first
        with pytest.raises(TeacherUnavailable):
            await second
        with pytest.raises(TeacherUnavailable):
            await teacher.score(prompt_ids=(1,), response_ids=(2,), top_k=1)
        assert teacher.busy_s() == 2.25

    run_virtual(main)


def test_a_rollout_that_is_given_up_costs_nothing() -> None:
    async def main() -> float:
        clock = VirtualClock()
        teacher = ReplayTeacher(costs=SECOND_PER_TOKEN, num_replicas=1, clock=clock)
        calls = [asyncio.create_task(teacher.score(prompt_ids=(1,), response_ids=(2,), top_k=1)) for _ in range(3)]
        await clock.sleep(0.5)
        calls[1].cancel()
        await asyncio.wait(calls)
        return clock.now()

    assert run_virtual(main) == 4.25
