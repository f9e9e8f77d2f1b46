"""How long things take in a simulation: formulas over the recipe's ``replay`` section. Pure; seconds and tokens.

The replay generator, teacher and trainer spend these times on the real schedule, the baselines add them up on others.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from engine.recipe import ReplayConfig


def decode_step_s(costs: ReplayConfig, num_active: int) -> float:
    """One token for each of ``num_active`` sequences."""
    return costs.decode_step_s + costs.decode_slot_s * num_active


def prefill_s(costs: ReplayConfig, num_tokens: int) -> float:
    """Prompts of so many tokens enter slots together."""
    return costs.prefill_s + costs.prefill_token_s * num_tokens


def teacher_batch_s(costs: ReplayConfig, num_tokens: int) -> float:
    """A replica scores a batch, latency not included."""
    return costs.teacher_batch_s + costs.teacher_token_s * num_tokens


def micro_batch_s(costs: ReplayConfig, lengths: Sequence[int]) -> float:
    """Forward and backward over rollouts of these token counts: as long as the learner with the most tokens takes."""
    return costs.micro_batch_s + costs.learner_token_s * largest_share(lengths, costs.num_learners)


def largest_share(lengths: Sequence[int], num_shares: int) -> int:
    """Tokens of the largest share when the longest goes first to whoever has the least."""
    if num_shares == 1:
        return sum(lengths)
    shares = [0] * min(num_shares, len(lengths))
    for length in sorted(lengths, reverse=True):
        heapq.heapreplace(shares, shares[0] + length)
    return max(shares, default=0)
