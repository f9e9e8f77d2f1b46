"""Every rollout is computed once, no pass is over the budget, and nobody waits for a share that has much more to do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.megatron_config import MegatronConfig
from engine.training.rank_plan import pass_cost, place_of, plan, plan_passes
from tests.engine.training.cases import make_scored

lengths_strategy = st.lists(st.integers(2, 100), max_size=60)


@given(lengths=lengths_strategy, num_shares=st.integers(1, 6), room=st.integers(0, 200))
def test_each_rollout_is_in_one_pass_all_fit_and_every_share_has_as_many(
    lengths: list[int], num_shares: int, room: int
) -> None:
    budget = max(lengths, default=1) + room
    shares = plan_passes(lengths, num_shares=num_shares, budget=budget, attention_length=500.0)

    assert sorted(i for share in shares for indices in share for i in indices) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in indices) <= budget for share in shares for indices in share)
    assert len(shares) == num_shares
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) >= 1, "a call without rollouts is a pass, too"


@given(lengths=lengths_strategy.filter(bool), num_shares=st.integers(1, 6), room=st.integers(0, 200))
def test_there_are_not_many_more_passes_than_tokens_need(lengths: list[int], num_shares: int, room: int) -> None:
    budget = max(lengths) + room
    shares = plan_passes(lengths, num_shares=num_shares, budget=budget, attention_length=500.0)

    # Two passes of which each is at most half full would have been one.
    assert len(shares[0]) <= max(1, -(-2 * sum(lengths) // (num_shares * budget)) + 1)


@given(lengths=st.lists(st.integers(1, 100), min_size=40, max_size=80), num_shares=st.integers(2, 4))
def test_no_share_has_much_more_to_do_than_another(lengths: list[int], num_shares: int) -> None:
    shares = plan_passes(lengths, num_shares=num_shares, budget=400, attention_length=200.0)
    costs = [sum(pass_cost([lengths[i] for i in indices], 200.0) for indices in share) for share in shares]
    longest = max(pass_cost([length], 200.0) for length in lengths)

    assert max(costs) - min(costs) <= 2 * longest


def test_a_long_rollout_counts_for_its_attention() -> None:
    # 100 tokens and their attention cost as much as 200 tokens do in short pieces.
    shares = plan_passes([100, *[10] * 20], num_shares=2, budget=400, attention_length=100.0)
    with_long = next(share for share in shares if 0 in share[0])

    assert sum(len(indices) for indices in with_long) - 1 <= 3


def test_a_rollout_over_the_budget_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"rollout 1 has 11 .*micro_batch_tokens allows 10"):
        plan_passes([3, 11], num_shares=1, budget=10, attention_length=100.0)


def test_places_follow_megatrons_order_of_ranks() -> None:
    config = MegatronConfig(tensor_parallel=2, data_parallel=3, pipeline_parallel=2)

    places = [place_of(rank, config) for rank in range(config.num_ranks)]

    assert [place.share for place in places] == [0, 0, 1, 1, 2, 2] * 2
    assert [place.is_last_stage for place in places] == [False] * 6 + [True] * 6


def test_scores_go_to_the_last_stage_alone_and_all_else_to_every_rank_of_a_share() -> None:
    config = MegatronConfig(pipeline_parallel=2, data_parallel=2)
    scored = [make_scored(rollout_id=i, response=range(4 + i)) for i in range(5)]
    works = plan(scored, config=config, budget=64, attention_length=100.0)

    first, last = works[:2], works[2:]
    for early, late in zip(first, last, strict=True):
        for one, other in zip(early.micro_batches, late.micro_batches, strict=True):
            assert [rollout.index for rollout in one.rollouts] == [rollout.index for rollout in other.rollouts]
            assert all(rollout.scores is None and rollout.sampling_logprobs is None for rollout in one.rollouts)
            assert all(rollout.scores is scored[rollout.index].scores for rollout in other.rollouts)
            assert all(a.prompt_ids is b.prompt_ids for a, b in zip(one.rollouts, other.rollouts, strict=True))


def test_ranks_that_compute_alike_get_the_same_work() -> None:
    config = MegatronConfig(tensor_parallel=2, context_parallel=2)

    assert len({id(work) for work in plan([make_scored()], config=config, budget=64, attention_length=9.0)}) == 1
