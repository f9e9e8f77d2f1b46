"""The formulas that every schedule is simulated with."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.costs import decode_step_s, largest_share, micro_batch_s, prefill_s, teacher_batch_s
from engine.recipe import ReplayConfig
from engine.simulate.baselines import generate_batch_s, score_batch_s


def test_each_cost_is_a_fixed_part_and_one_per_unit() -> None:
    costs = ReplayConfig(
        decode_step_s=1, decode_slot_s=2, prefill_s=3, prefill_token_s=4, teacher_batch_s=5, teacher_token_s=6,
        micro_batch_s=7, learner_token_s=8,
    )  # fmt: skip

    assert decode_step_s(costs, 10) == 21
    assert prefill_s(costs, 10) == 43
    assert teacher_batch_s(costs, 10) == 65
    assert micro_batch_s(costs, [4, 6]) == 87


@given(st.lists(st.integers(1, 100), min_size=1, max_size=20), st.integers(1, 6))
def test_the_largest_share_lies_between_its_bounds(lengths: list[int], num_shares: int) -> None:
    share = largest_share(lengths, num_shares)

    assert max(max(lengths), sum(lengths) / num_shares) <= share <= sum(lengths)
    assert share <= sum(lengths) / num_shares + max(lengths), "longest first is never worse than that"


def test_a_batch_is_generated_when_its_longest_answer_is() -> None:
    costs = ReplayConfig(decode_step_s=1.0, decode_slot_s=0.5)

    # Two slots: 2 steps with both, then the third answer takes the free slot for 3 more.
    assert generate_batch_s([1, 1, 1], [2, 5, 3], costs, num_slots=2, shared=1) == pytest.approx(5 * 2.0)
    two = ReplayConfig(decode_step_s=1.0, decode_slot_s=0.5, num_samplers=2)
    assert generate_batch_s([1, 1, 1], [2, 5, 3], two, num_slots=2, shared=1) == pytest.approx(5 * 1.5)


def test_a_shared_prompt_is_computed_once() -> None:
    costs = ReplayConfig(decode_step_s=1.0, decode_slot_s=0.0, prefill_token_s=1.0)

    assert generate_batch_s([10, 10], [1, 1], costs, num_slots=2, shared=2) == pytest.approx(11.0)
    assert generate_batch_s([10, 10], [1, 1], costs, num_slots=2, shared=1) == pytest.approx(21.0)


def test_a_batch_is_scored_when_the_last_server_is_done() -> None:
    costs = ReplayConfig(teacher_token_s=1.0, teacher_latency_s=0.5)

    assert score_batch_s([3, 1, 1], costs, num_servers=1) == 5.5
    assert score_batch_s([3, 1, 1], costs, num_servers=2) == 3.5
