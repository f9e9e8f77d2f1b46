"""Which kernels do the work: decided by device, here and nowhere else. Triton's on CUDA, where there is triton."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ops.dense import Dense
from ops.formulas import has_formula
from ops.native_dense import DTYPES, native_dense
from ops.native_head import NativeHead, native_head
from ops.native_rows import native_rows
from ops.native_solve import native_solver
from ops.objectives import Objective
from ops.rows import Reduced, RowKernel
from ops.scores import Support, TeacherScores, support_of
from ops.shards import Shard
from ops.solve import Conditions
from ops.solved import Problem, Solution
from ops.torch_rows import TorchRows
from ops.torch_solve import solve_by_torch

Solver: TypeAlias = Callable[[Objective, Reduced, Tensor, Support, Conditions, Shard], Solution]
"""From what a kernel has reduced this rank's logits [B, W] to; ``ops.torch_solve`` is the one that all others equal."""


def kernel_for(device: torch.device) -> RowKernel:
    """A kernel for one call: on CPU the compiled one where it can be built, else plain torch."""
    if has_triton(device):
        from ops.triton_rows import TritonRows

        kernel: RowKernel = TritonRows()
        return kernel
    native = native_rows() if device.type == "cpu" else None
    return TorchRows() if native is None else native


def support_for(scores: TeacherScores, *, vocab_size: int) -> Support:
    """``ops.scores.support_of``, in few launches and passes where these count."""
    if has_triton(scores.top_ids.device):
        from ops.triton_solve import support_by_triton

        return support_by_triton(scores, vocab_size=vocab_size)
    native = native_solver() if scores.top_ids.device.type == "cpu" else None
    if native is not None:
        return native.support(scores, vocab_size=vocab_size)
    return support_of(scores, vocab_size=vocab_size)


def solver_for(objective: Objective, shard: Shard, logits: Tensor) -> Solver:
    """Who solves the objective in one pass; or the algebra in plain torch, which can do all."""
    if not has_formula(objective):
        return solve_by_torch
    if shard.group is None and logits.dtype != torch.float64 and has_triton(logits.device):
        from ops.triton_solve import solve_by_triton

        return solve_by_triton
    native = native_solver() if logits.device.type == "cpu" else None
    return solve_by_torch if native is None else native


def dense_for(
    objective: Objective,
    teacher: Tensor,
    shard: Shard,
    conditions: Conditions,
    *,
    student_dtype: torch.dtype,
    block_rows: int,
    sampled_ids: Tensor | None = None,
) -> Problem:
    """The problem that a teacher's logits pose, [T, W] of this rank.

    Args:
        sampled_ids: [T] int, the tokens that ``student_logprob`` is of; −1: none.
    """
    is_wide = torch.float64 in (student_dtype, teacher.dtype)
    if shard.group is None and not is_wide and has_formula(objective) and has_triton(teacher.device):
        from ops.triton_dense import TritonDense

        assert sampled_ids is None, "lists of a whole vocabulary stay lists on CUDA"
        return TritonDense(objective, teacher, shard, conditions)
    if shard.group is None and has_formula(objective) and {student_dtype, teacher.dtype} <= set(DTYPES):
        native = native_dense() if teacher.device.type == "cpu" else None
        if native is not None:
            return native(objective, teacher, shard, conditions, sampled_ids=sampled_ids)
    return Dense(objective, teacher, shard, conditions, block_rows=block_rows, sampled_ids=sampled_ids)


def head_for(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    hidden_grad: Tensor | None,
    weight_grad: Tensor | None,
    bias_grad: Tensor | None,
    num_rows: int,
    workspace: Tensor | None,
) -> NativeHead | None:
    """A kernel that makes the logits of a head as well, for blocks of up to ``num_rows``; None: torch makes them.

    On CPU in float32, where it can be built, rows of matrices are contiguous, and blocks neither have fewer rows than
    two vectors nor more numbers than the second-level cache: beyond, torch's products are as fast or faster. In
    bfloat16 they run on matrix units.
    """
    tensors = [t for t in (hidden, weight, bias, hidden_grad, weight_grad, bias_grad) if t is not None]
    if hidden.device.type != "cpu" or not all(t.dtype == torch.float32 and t.stride(-1) == 1 for t in tensors):
        return None
    library = native_head()
    if library is None or not library.head_suits(hidden.shape[1], num_rows):
        return None
    return NativeHead(
        library, weight, bias, num_rows=num_rows, weight_grad=weight_grad, bias_grad=bias_grad, workspace=workspace
    )


def has_triton(device: torch.device) -> bool:
    return device.type == "cuda" and _is_installed()


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
