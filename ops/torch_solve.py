"""Values, metrics and gradient on few columns, for every objective, dtype, device and number of ranks, in plain torch.

The other solvers repeat this for some, faster: ``ops.native_solve`` on CPU, ``ops.triton_solve`` on CUDA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.coarse import Coarse, coarsen, entropy, finite, merge, student
from ops.objectives import Objective
from ops.rows import Reduced
from ops.scores import Support
from ops.shards import Shard, Whole, combine
from ops.solve import Conditions, solve
from ops.solved import Solution


def solve_by_torch(
    objective: Objective, reduced: Reduced, logits: Tensor, support: Support, conditions: Conditions, shard: Shard
) -> Solution:
    """In float64; ``reduced`` is of this rank's ``logits`` [B, W]."""
    whole = combine(shard, reduced, logits, support)
    log_q, lse = student(whole.support_logits, whole.tail_lse)
    base = coarsen(merge(log_q, support.num_base), support.logprobs[:, : support.num_base])
    values, gradient = solve(objective, log_q, base, support, conditions)
    return Solution(
        values=values,
        metrics=_metrics(whole, log_q, lse, base, support),
        tail_shift=whole.tail_shift,
        tail_scale=gradient[:, -1] / whole.tail_sum.masked_fill(whole.tail_sum == 0.0, 1.0),
        support_gradient=gradient[:, :-1],
    )


def _metrics(whole: Whole, log_q: Tensor, lse: Tensor, base: Coarse, support: Support) -> dict[str, Tensor]:
    num_top = support.num_top
    top_logprobs, is_top = support.logprobs[:, :num_top], support.ids[:, :num_top] >= 0
    num_named = is_top.sum(dim=1)
    # A listed id is among the student's n largest when fewer than n logits are larger.
    is_shared = is_top & (whole.num_larger < num_named.unsqueeze(1))
    return {
        "teacher_mass": top_logprobs.exp().sum(dim=1),
        "student_mass": log_q[:, :num_top].exp().sum(dim=1),
        "topk_overlap": is_shared.sum(dim=1).double() / num_named.clamp(min=1),
        "teacher_entropy": entropy(base.log_p),
        "student_entropy": entropy(base.log_q),
        "student_logprob": torch.where(support.sampled_ids >= 0, whole.sampled_logits - finite(lse), 0.0),
    }
