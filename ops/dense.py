"""A teacher in the same process: its logits instead of a list, so the divergence is that of the whole vocabulary.

    B rows      V vocabulary      W columns of this rank      p, q teacher and student

Conventions are those of a list of all V (``ops.coarse``): columns where the student's logit is −inf are not there, and
the teacher is scaled to sum to 1 on the others; columns where the teacher's is −inf have p = 0 and, where log p is
needed, share ``TAIL_FLOOR`` in proportion to q.

On several ranks three all-reduces per block: the two largest logits, sums that make probabilities, sums of the result
(and one more for reverse KL, of what the teacher rules out). The gradient is computed again from a few numbers per row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ops.coarse import TAIL_FLOOR, finite
from ops.objectives import Objective, Plain, leaves
from ops.shards import Shard
from ops.solve import Conditions, Summands, excess, needs_floor, terms
from ops.solved import METRICS, Problem, Solved, blocks, check_version, version_of, working_dtype


class Dense(Problem):
    """A teacher's logits.

    Args:
        sampled_ids: [T] int, for the metric of that name; −1 and None: no token was sampled.
    """

    def __init__(
        self,
        objective: Objective,
        teacher: Tensor,
        shard: Shard,
        conditions: Conditions,
        *,
        block_rows: int,
        sampled_ids: Tensor | None = None,
    ) -> None:
        for _, leaf in leaves(objective):
            if not isinstance(leaf, get_args(Plain)):
                raise ValueError(
                    f"{leaf!r} looks at single tokens and needs TeacherScores; with the teacher's logits come "
                    "ForwardKL, ReverseKL, JSD, SkewKL and mixtures of them"
                )
        super().__init__(num_columns=shard.num_columns)
        self.teacher, self.shard, self.conditions, self.block_rows = teacher, shard, conditions, block_rows
        self._sampled_ids = sampled_ids
        self.teacher_version = version_of(teacher)
        self._leaves = [(weight, leaf) for weight, leaf in leaves(objective) if isinstance(leaf, get_args(Plain))]
        self._needs_floor = any(needs_floor(leaf) for _, leaf in self._leaves)

    def solve(self, logits: Tensor, start: int, end: int) -> DenseRows:
        parts = [
            self._solve(logits[first:last], start + first, start + last)
            for first, last in blocks(end - start, self.block_rows)
        ] or [self._solve(logits, start, end)]
        return DenseRows(
            values=torch.cat([part.values for part in parts]),
            metrics={name: torch.cat([part.metrics[name] for part in parts]) for name in METRICS},
            problem=self,
            start=start,
            constants=torch.cat([part.constants for part in parts]),
            row_scale=torch.cat([part.row_scale for part in parts]),
        )

    def _solve(self, logits: Tensor, start: int, end: int) -> DenseRows:
        shard, conditions, temperature = self.shard, self.conditions.rows(start, end), self.conditions.temperature
        log_totals = self._log_totals(logits, start, end, temperature)
        log_p, log_q = self._log_probs(logits, start, log_totals, temperature)
        floor = self._floor(log_p, log_q)
        value = torch.zeros_like(log_totals[:, :1])
        for share, terms_of_leaf, _ in self._terms(log_p, log_q, floor):
            for factor, a, b, log_ratio in terms_of_leaf:
                value += share * factor * _sum(excess(a, b, log_ratio))
        weight = self._weight(log_p, log_q, floor)
        at_1 = log_p, log_q
        log_totals_at_1 = log_totals
        if temperature != 1.0:
            log_totals_at_1 = self._log_totals(logits, start, end, 1.0)
            at_1 = self._log_probs(logits, start, log_totals_at_1, 1.0)
        sampled = sampled_logits(self._sampled_ids, logits, start, end, shard)
        sums = (value, _sum(weight), _sum(log_p.exp()), _sum(log_q.exp()), *(_entropy(log_probs) for log_probs in at_1))
        sums = shard.sum(torch.cat((*sums, sampled), dim=1)).unbind(dim=1)
        value, sum_weight, sum_p, sum_q, teacher_entropy, student_entropy, sampled = sums
        is_there = (sum_p > 0.0).double()  # where the student is ruled out altogether, the teacher is, too
        values, row_scale = conditions.apply(value * is_there, is_there.unsqueeze(1) / temperature)
        metrics = dict.fromkeys(METRICS, torch.zeros_like(is_there))
        metrics |= {"teacher_mass": is_there, "student_mass": is_there, "topk_overlap": is_there}
        metrics |= {"teacher_entropy": teacher_entropy, "student_entropy": student_entropy}
        if self._sampled_ids is not None:
            logprob = sampled - log_totals_at_1[:, 1] - log_totals_at_1[:, 3]
            metrics["student_logprob"] = logprob.masked_fill(self._sampled_ids[start:end] < 0, 0.0)
        # Divided by Σq, which is 1 but for rounding: so the gradient's sum vanishes to the last digit.
        mean = (sum_weight / sum_q.clamp(min=0.5)).unsqueeze(1)
        constants = torch.cat((log_totals, floor, mean), dim=1)
        return DenseRows(values, metrics, problem=self, start=start, constants=constants, row_scale=row_scale)

    def write(self, out: Tensor, logits: Tensor, start: int, constants: Tensor, row_scale: Tensor) -> None:
        """The gradient of rows [start, start + B)."""
        log_p, log_q = self._log_probs(logits, start, constants[:, :4], self.conditions.temperature)
        gradient = self._weight(log_p, log_q, constants[:, 4:5])
        gradient -= log_q.exp() * constants[:, 5:6].to(log_q.dtype)
        gradient *= row_scale.to(log_q.dtype)
        out[:, : self.num_columns].copy_(gradient)
        out[:, self.num_columns :] = 0.0

    def _terms(self, log_p: Tensor, log_q: Tensor, floor: Tensor) -> Iterator[tuple[float, Summands, Tensor]]:
        for share, leaf in self._leaves:
            floored = (
                torch.where(log_p == -torch.inf, log_q + floor.to(log_q.dtype), log_p) if needs_floor(leaf) else log_p
            )
            yield share, *terms(leaf, floored, log_q)

    def _weight(self, log_p: Tensor, log_q: Tensor, floor: Tensor) -> Tensor:
        weights = [share * weight for share, _, weight in self._terms(log_p, log_q, floor)]
        return weights[0] if len(weights) == 1 else torch.stack(weights).sum(dim=0)

    def _both(self, logits: Tensor, start: int, temperature: float) -> tuple[Tensor, Tensor]:
        """Teacher's and student's logits [B, columns that exist] in the working dtype, copies."""
        dtype = working_dtype(logits)
        z = logits[:, : self.num_columns].to(dtype, copy=True)
        t = self.teacher[start : start + len(z), : self.num_columns].to(dtype)
        t = t.masked_fill(z == -torch.inf, -torch.inf)
        return (t, z) if temperature == 1.0 else (t / temperature, z / temperature)

    def _log_totals(self, logits: Tensor, start: int, end: int, temperature: float) -> Tensor:
        """[B, 4] float64: largest logit of teacher and student, then the logarithm of Σ exp(logit − largest)."""
        t, z = self._both(logits, start, temperature)
        largest = finite(self.shard.max(torch.stack((_largest(t), _largest(z)), dim=1)))
        totals = torch.cat([_sum((x - largest[:, i : i + 1]).exp_()) for i, x in enumerate((t, z))], dim=1)
        return torch.cat((largest.double(), finite(self.shard.sum(totals).log())), dim=1)

    def _log_probs(self, logits: Tensor, start: int, log_totals: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """log p and log q [B, columns that exist]."""
        constants = log_totals.to(working_dtype(logits)).unsqueeze(2)
        t, z = self._both(logits, start, temperature)
        # The largest is taken off first: with both near 10⁴, logit − log Σ would lose four digits.
        return t.sub_(constants[:, 0]).sub_(constants[:, 2]), z.sub_(constants[:, 1]).sub_(constants[:, 3])

    def _floor(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """[B, 1] what log q and this add up to, over the columns that the teacher rules out, is ``TAIL_FLOOR``."""
        if not self._needs_floor:
            return torch.zeros((len(log_q), 1), dtype=torch.float64, device=log_q.device)
        ruled_out = _sum(log_q.exp().masked_fill_(log_p != -torch.inf, 0.0))
        return math.log(TAIL_FLOOR) - finite(self.shard.sum(ruled_out).log())


@dataclass(frozen=True, eq=False)
class DenseRows(Solved):
    """Rows of which the problem writes the gradient."""

    problem: Dense
    start: int
    constants: Tensor
    """[B, 6] float64: what makes logits log-probabilities (4), the floor, and the mean of the weights."""
    row_scale: Tensor
    """[B, 1] float64."""

    def write(self, out: Tensor, logits: Tensor, scale: Tensor | None = None) -> None:
        check_version(self.problem.teacher, self.problem.teacher_version)
        row_scale = self.row_scale if scale is None else self.row_scale * scale.unsqueeze(1)
        for first, last in blocks(len(logits), self.problem.block_rows):
            rows = slice(first, last)
            self.problem.write(out[rows], logits[rows], self.start + first, self.constants[rows], row_scale[rows])


def sampled_logits(sampled_ids: Tensor | None, logits: Tensor, start: int, end: int, shard: Shard) -> Tensor:
    """[B, 1] float64: this rank's summand, 0 where the token is another's or there is none."""
    if sampled_ids is None or logits.shape[1] == 0:
        return torch.zeros((end - start, 1), dtype=torch.float64, device=logits.device)
    columns = shard.local(sampled_ids[start:end].long()).unsqueeze(1)
    return logits.gather(1, columns.clamp(min=0)).double().masked_fill_(columns < 0, 0.0)


def _largest(z: Tensor) -> Tensor:
    if z.shape[1] == 0:
        return z.new_full((z.shape[0],), -torch.inf)
    return z.amax(dim=1)


def _entropy(log_p: Tensor) -> Tensor:
    return -_sum(log_p.exp() * finite(log_p))


def _sum(x: Tensor) -> Tensor:
    """[B, 1] float64."""
    return x.sum(dim=1, keepdim=True, dtype=torch.float64)
