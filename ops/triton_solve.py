"""Values, metrics and gradient on few columns by two Triton kernels, where plain torch takes 200 small ones.

At 8192 rows those took 0.5 ms of an H100 and, in launches, 4 ms of the host: more than reading 8192×32000 logits twice
and writing them once. A plain objective of one rank, in the student's float32 or less, is solved here; the algebra in
``ops.solve``, which is the definition, does the rest: mixtures, single tokens, shards, float64.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from ops.formulas import formula_of, tail_index
from ops.objectives import Objective, Plain
from ops.rows import Reduced
from ops.scores import Support, TeacherScores
from ops.shards import Shard
from ops.solve import Conditions
from ops.solved import METRICS, Solution
from ops.triton_solve_kernels import make_support, solve_row


def support_by_triton(scores: TeacherScores, *, vocab_size: int) -> Support:
    """``ops.scores.support_of`` in one launch; that ids are below ``vocab_size`` is asserted by the device."""
    num_rows, num_top = scores.top_ids.shape
    device = scores.top_ids.device
    ids = torch.empty((num_rows, num_top + 1), dtype=torch.int64, device=device)
    logprobs = torch.empty((num_rows, num_top + 1), dtype=torch.float64, device=device)
    is_valid = torch.empty(num_rows, dtype=torch.bool, device=device)
    sampled_ids = scores.sampled_ids.long().contiguous()
    if num_rows:
        top_ids, top_logprobs = _with_contiguous_rows(scores.top_ids), _with_contiguous_rows(scores.top_logprobs)
        lanes = _power_of_two(num_top + 1)
        make_support[(num_rows,)](
            top_ids,
            top_ids.stride(0),
            top_logprobs,
            top_logprobs.stride(0),
            sampled_ids,
            scores.sampled_logprobs.contiguous(),
            ids,
            logprobs,
            is_valid,
            num_top,
            vocab_size,
            LANES=lanes,
            num_warps=_warps(lanes),
        )
        torch._assert_async(is_valid.all(), f"a token id is not below the vocabulary's {vocab_size}")
    return Support(ids=ids, logprobs=logprobs, sampled_ids=sampled_ids, num_top=num_top)


def solve_by_triton(
    objective: Objective, reduced: Reduced, logits: Tensor, support: Support, conditions: Conditions, shard: Shard
) -> Solution:
    """What ``ops.torch_solve`` computes, in the dtype of ``reduced``.

    Args:
        objective: one that ``has_formula``.
        shard: all columns.
    """
    assert isinstance(objective, get_args(Plain))
    assert shard.group is None
    num_rows, num_ids = support.ids.shape
    support_gradient = torch.empty_like(reduced.support_logits)
    # The values are a tensor of their own: autograd forbids changing what a function returns as a view.
    values, metrics = support_gradient.new_empty(num_rows), support_gradient.new_empty((len(METRICS), num_rows))
    tail_shift, tail_scale = torch.empty_like(values), torch.empty_like(values)
    if num_rows:
        weights = conditions.token_weights
        lanes = _power_of_two(num_ids + 1)
        temperature = float(conditions.temperature)
        solve_row[(num_rows,)](
            logits,
            logits.stride(0),
            reduced.support_logits.contiguous(),
            reduced.tail_max.contiguous(),
            reduced.tail_sum.contiguous(),
            reduced.largest.contiguous(),
            reduced.largest.shape[1],
            support.ids.contiguous(),
            support.logprobs.contiguous(),
            support.sampled_ids.contiguous(),
            values if weights is None else weights.contiguous(),
            values,
            metrics,
            tail_shift,
            tail_scale,
            support_gradient,
            num_rows,
            num_ids,
            **formula_of(objective).constants(),
            TAIL=tail_index(objective.tail),
            TEMPERATURE=temperature,
            FACTOR=temperature * temperature if conditions.square_temperature else 1.0,
            CLAMP=None if conditions.clamp is None else float(conditions.clamp),
            HAS_WEIGHTS=weights is not None,
            LANES=lanes,
            STEP=16,
            num_warps=_warps(lanes),
        )
    return Solution(
        values=values,
        metrics=dict(zip(METRICS, metrics.unbind(), strict=True)),
        tail_shift=tail_shift,
        tail_scale=tail_scale,
        support_gradient=support_gradient,
    )


def _with_contiguous_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _power_of_two(count: int) -> int:
    return max(16, 1 << (count - 1).bit_length())


def _warps(lanes: int) -> int:
    return min(8, max(1, lanes // 128))
