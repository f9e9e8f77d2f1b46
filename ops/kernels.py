"""Which kernels do the work: decided by device, here and nowhere else. Triton's on CUDA, where there is triton."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ops.dense import Dense
from ops.native_rows import native_rows
from ops.objectives import Objective
from ops.rows import Reduced, RowKernel
from ops.scores import Support, TeacherScores, support_of
from ops.shards import Shard
from ops.solve import Conditions
from ops.solved import Problem, Solution
from ops.torch_rows import TorchRows

Solver: TypeAlias = Callable[[Objective, Reduced, Tensor, Support, Conditions], Solution]
"""From what a kernel has reduced logits [B, W] to."""


def kernel_for(device: torch.device) -> RowKernel:
    """A kernel for one call: on CPU the compiled one where it can be built, else plain torch."""
    if has_triton(device):
        from ops.triton_rows import TritonRows

        kernel: RowKernel = TritonRows()
        return kernel
    native = native_rows() if device.type == "cpu" else None
    return TorchRows() if native is None else native


def support_for(scores: TeacherScores, *, vocab_size: int) -> Support:
    """``ops.scores.support_of``, in few launches where launches count."""
    if has_triton(scores.top_ids.device):
        from ops.triton_solve import support_by_triton

        return support_by_triton(scores, vocab_size=vocab_size)
    return support_of(scores, vocab_size=vocab_size)


def solver_for(objective: Objective, shard: Shard, device: torch.device) -> Solver | None:
    """Who solves the objective in one launch; None: nobody, use the shared algebra."""
    if shard.group is None and has_triton(device):
        from ops.triton_objectives import has_formula
        from ops.triton_solve import solve_by_triton

        return solve_by_triton if has_formula(objective) else None
    return None


def dense_for(
    objective: Objective,
    teacher: Tensor,
    shard: Shard,
    conditions: Conditions,
    *,
    student_dtype: torch.dtype,
    block_rows: int,
) -> Problem:
    """The problem that a teacher's logits pose, [T, W] of this rank."""
    if shard.group is None and student_dtype != torch.float64 != teacher.dtype and has_triton(teacher.device):
        from ops.triton_dense import TritonDense
        from ops.triton_objectives import has_formula

        if has_formula(objective):
            return TritonDense(objective, teacher, shard, conditions)
    return Dense(objective, teacher, shard, conditions, block_rows=block_rows)


def has_triton(device: torch.device) -> bool:
    return device.type == "cuda" and _is_installed()


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
