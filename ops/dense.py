"""A teacher in the same process: its logits instead of a list, so the divergence is that of the whole vocabulary.

    B rows      V vocabulary      W columns of this rank      p, q teacher and student

Conventions are those of a list of all V (``ops.coarse``): columns where the student's logit is −inf are not there, and
the teacher is scaled to sum to 1 on the others; columns where the teacher's is −inf have p = 0 and, where log p is
needed, share ``TAIL_FLOOR`` in proportion to q.

On several ranks three all-reduces per block: the two largest logits, sums that make probabilities, sums of the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ops.coarse import TAIL_FLOOR, finite
from ops.objectives import Objective, Plain, leaves
from ops.shards import Shard
from ops.solve import Conditions, excess, needs_floor, terms
from ops.solved import METRICS, Problem, Solved, working_dtype


class Dense(Problem):
    """A teacher's logits."""

    def __init__(self, objective: Objective, teacher: Tensor, shard: Shard, conditions: Conditions) -> None:
        for _, leaf in leaves(objective):
            if not isinstance(leaf, get_args(Plain)):
                raise ValueError(
                    f"{leaf!r} looks at single tokens and needs TeacherScores; with the teacher's logits come "
                    "ForwardKL, ReverseKL, JSD, SkewKL and mixtures of them"
                )
        super().__init__(num_columns=shard.num_columns, solves_all_at_once=False)
        self._objective, self._teacher, self._shard, self._conditions = objective, teacher, shard, conditions

    def solve(self, logits: Tensor, start: int, end: int) -> DenseRows:
        shard, conditions = self._shard, self._conditions.rows(start, end)
        log_p, log_q = self._log_probs(logits, start, end, conditions.temperature)
        weight, value = torch.zeros_like(log_q), torch.zeros_like(log_q[:, :1], dtype=torch.float64)
        for share, leaf in leaves(self._objective):
            assert isinstance(leaf, get_args(Plain))
            log_p_leaf = self._with_floor(log_p, log_q) if needs_floor(leaf) else log_p
            parts, leaf_weight = terms(leaf, log_p_leaf, log_q)
            for factor, a, b, log_ratio in parts:
                value += share * factor * excess(a, b, log_ratio).sum(dim=1, keepdim=True, dtype=torch.float64)
            weight += share * leaf_weight
        if conditions.temperature != 1.0:
            weight /= conditions.temperature
        metrics_log_p, metrics_log_q = log_p, log_q
        if conditions.temperature != 1.0:
            metrics_log_p, metrics_log_q = self._log_probs(logits, start, end, 1.0)
        q = log_q.exp()
        sums = shard.sum(
            torch.cat(
                (
                    value,
                    weight.sum(dim=1, keepdim=True, dtype=torch.float64),
                    q.sum(dim=1, keepdim=True, dtype=torch.float64),
                    _entropy(metrics_log_p),
                    _entropy(metrics_log_q),
                ),
                dim=1,
            )
        )
        values, row_scale = conditions.apply(sums[:, 0], torch.ones_like(sums[:, :1]))
        # Divided by Σq, which is 1 but for rounding: so the gradient's sum vanishes to the last digit.
        mean = sums[:, 1] / sums[:, 2].clamp(min=0.5)
        weight -= q * mean.to(q.dtype).unsqueeze(1)
        weight *= row_scale.to(q.dtype)
        is_there = (sums[:, 2] > 0.0).double()
        metrics = dict.fromkeys(METRICS, torch.zeros_like(is_there))
        metrics |= {"teacher_mass": is_there, "student_mass": is_there, "topk_overlap": is_there}
        metrics |= {"teacher_entropy": sums[:, 3], "student_entropy": sums[:, 4]}
        return DenseRows(values=values, metrics=metrics, gradient=weight)

    def _log_probs(self, logits: Tensor, start: int, end: int, temperature: float) -> tuple[Tensor, Tensor]:
        """log p and log q [B, columns that exist] in the working dtype of the student."""
        shard, dtype = self._shard, working_dtype(logits)
        z = logits[:, : shard.num_columns].to(dtype, copy=True)
        t = self._teacher[start:end, : shard.num_columns].to(dtype).masked_fill(z == -torch.inf, -torch.inf)
        if temperature != 1.0:
            z, t = z / temperature, t / temperature
        largest = shard.max(torch.stack((_largest(t), _largest(z))))
        shift = finite(largest).unsqueeze(2)
        t, z = t - shift[0], z - shift[1]
        totals = torch.stack([x.exp().sum(dim=1, keepdim=True, dtype=torch.float64) for x in (t, z)])
        log_totals = finite(shard.sum(totals).log()).to(dtype)
        return t.sub_(log_totals[0]), z.sub_(log_totals[1])

    def _with_floor(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Σ over the columns that the teacher rules out is the floor, shared as the student's q is."""
        ruled_out = log_p == -torch.inf
        mass = self._shard.sum(torch.where(ruled_out, log_q.exp(), 0.0).sum(dim=1, keepdim=True, dtype=torch.float64))
        floor = (math.log(TAIL_FLOOR) - finite(mass.log())).to(log_q.dtype)
        return torch.where(ruled_out, log_q + floor, log_p)


@dataclass(frozen=True, eq=False)
class DenseRows(Solved):
    """Rows that come with their gradient."""

    gradient: Tensor
    """[B, columns that exist], working dtype."""

    def write(self, out: Tensor, logits: Tensor, scale: Tensor | None = None) -> None:
        num_columns = self.gradient.shape[1]
        gradient = self.gradient if scale is None else self.gradient * scale.unsqueeze(1).to(self.gradient.dtype)
        out[:, :num_columns].copy_(gradient)
        out[:, num_columns:].zero_()


def _largest(z: Tensor) -> Tensor:
    if z.shape[1] == 0:
        return z.new_full((z.shape[0],), -torch.inf)
    return z.amax(dim=1)


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * finite(log_p)).sum(dim=1, keepdim=True, dtype=torch.float64)
