"""A teacher that lists its top-k: from rows of logits to values, metrics and gradient, by way of few categories."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ops.coarse import coarsen, entropy, finite, merge, student
from ops.kernels import kernel_for, solver_for, support_for
from ops.objectives import Objective
from ops.rows import Reduced, RowKernel, no_columns
from ops.scores import Support, TeacherScores, check_ids
from ops.shards import Shard, Whole, combine
from ops.solve import Conditions, solve, wants_student_ids
from ops.solved import Problem, Solution, Solved, working_dtype


class Listed(Problem):
    """Scores on listed ids."""

    def __init__(self, objective: Objective, scores: TeacherScores, shard: Shard, conditions: Conditions) -> None:
        super().__init__(num_columns=shard.num_columns)
        self._objective, self._shard, self._conditions = objective, shard, conditions
        self._support = support_for(scores, vocab_size=shard.vocab_size)
        self._kernel = kernel_for(scores.top_ids.device)
        self._solver = solver_for(objective, shard, scores.top_ids.device)
        self._num_student = wants_student_ids(objective)
        self._extra_logprobs = scores.extra_logprobs
        if self._num_student and scores.extra_ids is not None:
            assert scores.extra_logprobs is not None
            check_ids(scores.extra_ids, shard.vocab_size)
            self._support = self._support.with_student(
                scores.extra_ids[:, : self._num_student], scores.extra_logprobs[:, : self._num_student]
            )

    def solve(self, logits: Tensor, start: int, end: int) -> Rows:
        shard, kernel = self._shard, self._kernel
        support = self._support.rows(start, end)
        if self._num_student and support.student_places is None:
            support = self._with_student_ids(support, logits, start, end)
        local_ids = shard.local(support.ids)
        if shard.num_columns:
            reduced = kernel.reduce(logits, local_ids, num_columns=shard.num_columns, k=support.num_top)
        else:
            reduced = no_columns(local_ids, k=support.num_top, dtype=working_dtype(logits))
        conditions = self._conditions.rows(start, end)
        if self._solver is not None and logits.dtype != torch.float64:
            solution = self._solver(self._objective, reduced, logits, support, conditions)
        else:
            solution = self._solve_reduced(reduced, logits, support, local_ids, conditions)
        return Rows(
            values=solution.values,
            metrics=solution.metrics,
            kernel=kernel,
            local_ids=local_ids,
            num_columns=shard.num_columns,
            tail_shift=solution.tail_shift,
            tail_scale=solution.tail_scale,
            support_gradient=solution.support_gradient,
        )

    def _solve_reduced(
        self, reduced: Reduced, logits: Tensor, support: Support, local_ids: Tensor, conditions: Conditions
    ) -> Solution:
        sampled_logits = _column(logits, self._shard.local(support.sampled_ids))
        whole = combine(self._shard, reduced, support.ids, local_ids, sampled_logits)
        log_q, lse = student(whole.support_logits, whole.tail_lse)
        values, gradient = solve(self._objective, log_q, support, conditions)
        return Solution(
            values=values,
            metrics=_metrics(whole, log_q, lse, support),
            tail_shift=whole.tail_shift,
            tail_scale=gradient[:, -1] / whole.tail_sum.masked_fill(whole.tail_sum == 0.0, 1.0),
            support_gradient=gradient[:, :-1],
        )

    def _with_student_ids(self, support: Support, logits: Tensor, start: int, end: int) -> Support:
        """The k largest logits; on several ranks, of those that each rank finds: one more gather."""
        k, shard = self._num_student, self._shard
        assert self._extra_logprobs is not None
        largest = logits[:, : shard.num_columns].topk(min(k, shard.num_columns), dim=1)
        ids = largest.indices + shard.start
        if shard.group is not None:
            missing = (0, k - ids.shape[1])
            found = torch.nn.functional.pad(largest.values.double(), missing, value=-torch.inf)
            found = shard.gather_columns(found)
            ids = shard.gather_columns(torch.nn.functional.pad(ids, missing, value=-1))
            order = found.sort(dim=1, descending=True, stable=True).indices[:, :k]
            ids = ids.gather(1, order)
        return support.with_student(ids, self._extra_logprobs[start:end, : ids.shape[1]])


@dataclass(frozen=True, eq=False)
class Rows(Solved):
    """Rows of which a kernel writes the gradient."""

    kernel: RowKernel
    local_ids: Tensor
    num_columns: int
    tail_shift: Tensor
    tail_scale: Tensor
    support_gradient: Tensor

    def write(self, out: Tensor, logits: Tensor, scale: Tensor | None = None) -> None:
        if not self.num_columns:
            out.zero_()
            return
        dtype = working_dtype(logits)
        tail_scale, support_gradient = self.tail_scale, self.support_gradient
        if scale is not None:
            tail_scale, support_gradient = tail_scale * scale, support_gradient * scale.unsqueeze(1)
        self.kernel.expand(
            out,
            logits,
            self.local_ids,
            num_columns=self.num_columns,
            tail_shift=self.tail_shift.to(dtype),
            tail_scale=tail_scale.to(dtype),
            support_gradient=support_gradient.to(dtype),
        )


def _column(logits: Tensor, columns: Tensor) -> Tensor:
    """[B] logits at [B] columns; 0 at −1."""
    if logits.shape[1] == 0:
        return logits.new_zeros(len(columns))
    return logits.gather(1, columns.clamp(min=0).unsqueeze(1)).squeeze(1).masked_fill(columns < 0, 0.0)


def _metrics(whole: Whole, log_q: Tensor, lse: Tensor, support: Support) -> dict[str, Tensor]:
    num_top, base = support.num_top, support.num_base
    top_logprobs, is_top = support.logprobs[:, :num_top], support.ids[:, :num_top] >= 0
    view = coarsen(merge(log_q, base), support.logprobs[:, :base])
    num_named = is_top.sum(dim=1)
    # A listed id is among the student's n largest when fewer than n logits are larger.
    is_shared = is_top & (whole.num_larger[:, :num_top] < num_named.unsqueeze(1))
    return {
        "teacher_mass": top_logprobs.exp().sum(dim=1),
        "student_mass": log_q[:, :num_top].exp().sum(dim=1),
        "topk_overlap": is_shared.sum(dim=1).double() / num_named.clamp(min=1),
        "teacher_entropy": entropy(view.log_p),
        "student_entropy": entropy(view.log_q),
        "student_logprob": torch.where(support.sampled_ids >= 0, whole.sampled_logits - finite(lse), 0.0),
    }
