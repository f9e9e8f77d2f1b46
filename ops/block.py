"""One block of full-vocabulary rows: from logits to the gradient, in the buffer that holds them.

    B rows of the block      V vocabulary      C = K + 1 columns of the support      K teacher's top-k

Passes over the [B, V] buffer: one to find the largest logits of the tail, one for exp, one for its sum, one to scale it
into the gradient. Everything else is [B, C].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.coarse import Coarse, coarsen, entropy, solve
from ops.objectives import Objective
from ops.scores import Support

_CHUNK = 64
"""Columns that share one maximum."""

METRICS = ("teacher_mass", "student_mass", "topk_overlap", "teacher_entropy", "student_entropy", "student_logprob")


def solve_block(
    objective: Objective, logits: Tensor, support: Support, *, want_gradient: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Values and metrics of the block; ``logits`` is overwritten with the gradient of the sum of the values.

    Args:
        logits: [B, V] float32 or float64, contiguous. With ``want_gradient=False`` it holds nothing of use afterwards.
        support: of the same B rows.

    Returns:
        [B] float64 nats, and [B] float64 for each of ``METRICS`` (see ``ops.divergence.Divergence``).
    """
    num_top = support.ids.shape[1] - 1
    support_logits = logits.gather(1, support.ids).double()
    sampled_logits = logits.gather(1, support.sampled_ids.clamp(min=0).unsqueeze(1)).squeeze(1).double()
    logits.scatter_(1, support.ids, -torch.inf)
    largest = _largest(logits, min(max(num_top, 1), logits.shape[1])).double()
    top = largest[:, :1]
    # A tail of which nothing is left (or only −inf) keeps its −inf: exp(−inf − 0) is 0 as it should be, not NaN.
    # In the dtype of the logits: a float64 operand would make torch work on a float64 copy of the block.
    shift = top.masked_fill(top == -torch.inf, 0.0).to(logits.dtype)
    logits.sub_(shift).exp_()
    tail_sum = logits.sum(dim=1, dtype=logits.dtype).double()
    coarse = coarsen(support_logits, tail_sum.log() + shift.double().squeeze(1), support.logprobs)

    values, gradient = solve(objective, coarse)
    if want_gradient:
        per_unit = gradient[:, -1] / tail_sum.masked_fill(tail_sum == 0.0, 1.0)
        logits.mul_(per_unit.unsqueeze(1).to(logits.dtype))
        # Added, not written: padded columns repeat an id of their row and bring 0.
        logits.scatter_add_(1, support.ids, gradient[:, :-1].to(logits.dtype))
    metrics = _metrics(coarse, support, support_logits, largest)
    metrics["student_logprob"] = torch.where(support.sampled_ids >= 0, sampled_logits - coarse.student_lse, 0.0)
    return values, metrics


def _largest(logits: Tensor, k: int) -> Tensor:
    """[B, k]: the k largest of each row, descending.

    The k largest lie in the k chunks with the largest maxima, so one cheap pass leaves 64·k candidates: for 49,152
    columns and k = 64 a third faster than sorting out all of them.
    """
    num_rows, num_columns = logits.shape
    whole = num_columns - num_columns % _CHUNK
    if k * _CHUNK * 4 > num_columns:
        return logits.topk(k, dim=1).values
    chunks = logits[:, :whole].view(num_rows, -1, _CHUNK)
    best = chunks.amax(dim=2).topk(k, dim=1).indices.unsqueeze(2).expand(-1, -1, _CHUNK)
    candidates = torch.cat((chunks.gather(1, best).flatten(1), logits[:, whole:]), dim=1)
    return candidates.topk(k, dim=1).values


def _metrics(coarse: Coarse, support: Support, support_logits: Tensor, largest_of_tail: Tensor) -> dict[str, Tensor]:
    top, num_top = support.named[:, :-1], support.ids.shape[1] - 1
    named_logits = support_logits.masked_fill(~support.named, -torch.inf)
    ranked = torch.cat((named_logits, largest_of_tail), dim=1).topk(max(num_top, 1), dim=1).values
    num_named = top.sum(dim=1)
    # The student's k-th largest logit, k being the length of the teacher's list in this row.
    threshold = ranked.gather(1, (num_named - 1).clamp(min=0).unsqueeze(1))
    shared = ((named_logits[:, :-1] >= threshold) & top).sum(dim=1)
    return {
        "teacher_mass": support.logprobs[:, :-1].exp().sum(dim=1),
        "student_mass": coarse.log_q[:, :-2].exp().sum(dim=1),
        "topk_overlap": shared.double() / num_named.clamp(min=1),
        "teacher_entropy": entropy(coarse.log_p),
        "student_entropy": entropy(coarse.log_q),
    }
