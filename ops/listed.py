"""A teacher that lists its top-k: from rows of logits to values, metrics and gradient, by way of few categories."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ops.kernels import kernel_for, solver_for, support_for
from ops.objectives import Objective
from ops.rows import RowKernel, no_columns
from ops.scores import Support, TeacherScores, check_ids
from ops.shards import Shard
from ops.solve import Conditions, wants_student_ids
from ops.solved import Problem, Solved, working_dtype


class Listed(Problem):
    """Scores on listed ids."""

    def __init__(self, objective: Objective, scores: TeacherScores, shard: Shard, conditions: Conditions) -> None:
        super().__init__(num_columns=shard.num_columns)
        self._objective, self._shard, self._conditions = objective, shard, conditions
        self._support = support_for(scores, vocab_size=shard.vocab_size)
        self._kernel = kernel_for(scores.top_ids.device)
        self._num_student = wants_student_ids(objective)
        self._extra_logprobs = scores.extra_logprobs
        if self._num_student and scores.extra_ids is not None:
            assert scores.extra_logprobs is not None
            check_ids(scores.extra_ids, shard.vocab_size)
            self._support = self._support.with_student(
                scores.extra_ids[:, : self._num_student], scores.extra_logprobs[:, : self._num_student]
            )

    @property
    def reads_by_kernel(self) -> bool:
        """The kernel is the first who looks at logits, so they need not be there before."""
        return self.num_columns > 0 and not (self._num_student and self._support.student_places is None)

    def solve(self, logits: Tensor, start: int, end: int, kernel: RowKernel | None = None) -> Rows:
        """
        Args:
            kernel: one for these logits alone.
        """
        shard, kernel = self._shard, self._kernel if kernel is None else kernel
        support = self._support.rows(start, end)
        if self._num_student and support.student_places is None:
            support = self._with_student_ids(support, logits, start, end)
        local_ids = shard.local(support.ids)
        if shard.num_columns:
            reduced = kernel.reduce(logits, local_ids, num_columns=shard.num_columns, k=support.num_top)
        else:
            reduced = no_columns(local_ids, k=support.num_top, dtype=working_dtype(logits))
        solve = solver_for(self._objective, shard, logits)
        solution = solve(self._objective, reduced, logits, support, self._conditions.rows(start, end), shard)
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
