"""Who computes which rollouts: from the rollouts of one call to the work of every rank. Pure, numpy alone.

    D data-parallel shares      M passes (micro-batches) of each share, equally many      L tokens of a rollout

A pass holds at most ``micro_batch_tokens`` tokens. What it costs is its tokens, and for attention their lengths
squared: L + L² / A, where A is the length at which attention costs as much as all matrices together. Rollouts go,
longest first, to the cheapest pass that has room for them (LPT: at most 4/3 of the best there is); the passes go to
shares by cost, so that those that run at the same time, and wait for each other where experts are spread, cost alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from engine.generation.top_ids import top_ids_of
from engine.megatron_config import MegatronConfig
from engine.training.rank_work import RankMicroBatch, RankRollout, RankWork
from engine.types import ScoredRollout
from teacher.protocol import Scores


class RankPlace(msgspec.Struct, frozen=True):
    """Where a rank stands in its layout."""

    share: int
    """0 … D−1: ranks of one share get the same rollouts."""
    is_last_stage: bool
    """Where logits are compared with scores."""


def place_of(rank: int, config: MegatronConfig) -> RankPlace:
    """Megatron's own order of ranks: tensor, context, (expert,) data, pipeline parallel, the first varying fastest."""
    per_share = config.tensor_parallel * config.context_parallel
    share, stage = rank // per_share % config.data_parallel, rank // (per_share * config.data_parallel)
    return RankPlace(share, stage == config.pipeline_parallel - 1)


def plan_passes(
    lengths: Sequence[int], *, num_shares: int, budget: int, attention_length: float
) -> list[list[list[int]]]:
    """Indices of the rollouts of each pass of each share: [D][M][…], each rollout once, some passes perhaps empty.

    A function of the arguments alone: equal calls give equal plans.

    Args:
        budget: most tokens of a pass.
        attention_length: A.

    Raises:
        ValueError: a rollout alone is over the budget.
    """
    for i, length in enumerate(lengths):
        if length > budget:
            raise ValueError(
                f"rollout {i} has {length} prompt and response tokens, learner.micro_batch_tokens allows {budget} in a "
                "pass; make it shorter or raise the budget"
            )
    num_passes = max(1, -(-sum(lengths) // (num_shares * budget)))
    while (passes := _pack(lengths, num_shares * num_passes, budget, attention_length)) is None:
        num_passes += 1
    shares: list[list[list[int]]] = [[] for _ in range(num_shares)]
    for number in range(num_passes):
        alike = passes[number * num_shares : (number + 1) * num_shares]
        # There and back again, so that no share gets the dearest of every row.
        for share, indices in zip(shares if number % 2 == 0 else reversed(shares), alike, strict=True):
            share.append(sorted(indices))
    return shares


def _pack(lengths: Sequence[int], num_passes: int, budget: int, attention_length: float) -> list[list[int]] | None:
    """Dearest pass first; None when they do not fit."""
    tokens = np.zeros(num_passes, np.int64)
    costs = np.zeros(num_passes)
    passes: list[list[int]] = [[] for _ in range(num_passes)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        has_room = tokens + lengths[i] <= budget
        if not has_room.any():
            return None
        chosen = int(np.where(has_room, costs, np.inf).argmin())
        passes[chosen].append(i)
        tokens[chosen] += lengths[i]
        costs[chosen] += pass_cost([lengths[i]], attention_length)
    return [passes[i] for i in np.argsort(-costs, kind="stable")]


def pass_cost(lengths: Sequence[int], attention_length: float) -> float:
    """Of rollouts of these lengths in one pass, in tokens."""
    return float(sum(length + length * length / attention_length for length in lengths))


def plan(
    scored: Sequence[ScoredRollout[Scores]],
    *,
    config: MegatronConfig,
    budget: int,
    attention_length: float,
    is_last: bool = False,
) -> list[RankWork]:
    """The work of every rank of ``config``, in order. Ranks that compute alike get the same object.

    Args:
        budget: most tokens of a pass.
        attention_length: A.
        is_last: of the step's calls.

    Raises:
        ValueError: a rollout alone is over the budget.
    """
    lengths = [len(item.rollout.prompt.token_ids) + item.rollout.num_tokens for item in scored]
    shares = plan_passes(lengths, num_shares=config.data_parallel, budget=budget, attention_length=attention_length)
    with_scores = [_rollout(index, item) for index, item in enumerate(scored)]
    without = [
        msgspec.structs.replace(rollout, scores=None, sampling_logprobs=None, top_ids=None) for rollout in with_scores
    ]
    places = [place_of(rank, config) for rank in range(config.num_ranks)]
    work = {
        place: RankWork(
            micro_batches=tuple(
                RankMicroBatch(rollouts=tuple((with_scores if place.is_last_stage else without)[i] for i in indices))
                for indices in shares[place.share]
            ),
            is_last=is_last,
        )
        for place in set(places)
    }
    return [work[place] for place in places]


def _rollout(index: int, item: ScoredRollout[Scores]) -> RankRollout:
    rollout = item.rollout
    return RankRollout(
        index=index,
        prompt_ids=np.asarray(rollout.prompt.token_ids, np.int32),
        response_ids=np.asarray(rollout.response_ids, np.int32),
        scores=item.scores,
        sampling_logprobs=np.asarray(rollout.sampling_logprobs, np.float32) if rollout.sampling_logprobs else None,
        top_ids=top_ids_of(rollout),
    )
