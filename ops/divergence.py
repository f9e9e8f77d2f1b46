"""A divergence between teacher scores and student logits, per position, with its gradient.

    T positions    V vocabulary    K teacher's top-k    z logits    q = softmax(z)    S support (``ops.scores``)

The forward pass computes the gradient along with the value, in blocks of rows; the backward pass only scales it.
Where the logits come from a linear head, ``ops.linear`` does without a [T, V] tensor altogether.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.block import METRICS, solve_block
from ops.objectives import Objective
from ops.scores import Support, TeacherScores, support_of


@dataclass(frozen=True, eq=False)
class Divergence:
    """What ``divergence`` and ``linear_divergence`` return."""

    values: Tensor
    """[T] nats, float32 (float64 when the logits are); carries the gradient."""
    metrics: dict[str, Tensor]
    """[T] each, dtype of ``values``, no gradient:

    teacher_mass, student_mass: probability of the teacher's top-k under each model's full softmax.
    topk_overlap: share of the teacher's top-k that is among the student's as many largest.
    teacher_entropy, student_entropy: nats, with the tail as one category, so a lower bound of the full entropy.
    student_logprob: nats, of the sampled token under the student's full softmax; 0 where there is none.
    """


def divergence(objective: Objective, logits: Tensor, scores: TeacherScores, *, block_rows: int = 256) -> Divergence:
    """Divergence of each position from logits.

    With p the teacher, q the student, S the teacher's top-k and the sampled token, p_tail = 1 − Σ_S p and q_tail
    likewise, under ``tail="bucket"``::

        ForwardKL   Σ_S p log(p/q) + p_tail log(p_tail/q_tail)
            ∂/∂z_v = q_v − p_v for v in S, q_v − p_tail q_v / q_tail otherwise
        ReverseKL   Σ_S q log(q/p) + q_tail log(q_tail/p_tail)
            ∂/∂z_v = q_v (log(q_v/p_v) − value) for v in S, q_v (log(q_tail/p_tail) − value) otherwise

    ``ops.objectives.Tail`` says what the other tails are; ``ops.coarse`` what happens at −inf and at rounding.

    Args:
        logits: [T, V] any float dtype, not changed. −inf marks columns outside the vocabulary (padding).
        scores: of the same T positions.
        block_rows: rows that are worked on at a time, in float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes disagree or an id is out of range.
    """
    check_block_rows(block_rows)
    if logits.dim() != 2:
        raise ValueError(f"logits must be [T, V], got {tuple(logits.shape)}")
    support = support_of(scores, num_rows=logits.shape[0], vocab_size=logits.shape[1])
    values, *metrics = _FromLogits.apply(logits, objective, support, block_rows)  # type: ignore[no-untyped-call]
    return Divergence(values=values, metrics=dict(zip(METRICS, metrics, strict=True)))


class Columns:
    """Collects [B] results of the blocks into [T] tensors."""

    def __init__(self, num_rows: int, like: Tensor) -> None:
        dtype = working_dtype(like)
        self.values = torch.empty(num_rows, dtype=dtype, device=like.device)
        self.metrics = {name: torch.empty_like(self.values) for name in METRICS}

    def put(self, start: int, end: int, values: Tensor, metrics: dict[str, Tensor]) -> None:
        self.values[start:end] = values
        for name, metric in metrics.items():
            self.metrics[name][start:end] = metric


def working_dtype(tensor: Tensor) -> torch.dtype:
    """float32 from 8 or 11 significant bits up: too few to sum a vocabulary."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def blocks(num_rows: int, block_rows: int) -> Iterator[tuple[int, int]]:
    """[start, end) of ceil(T / block_rows) blocks of nearly equal size: a short last block runs at half the speed."""
    if num_rows == 0:
        return
    num_blocks = -(-num_rows // block_rows)
    for i in range(num_blocks):
        yield num_rows * i // num_blocks, num_rows * (i + 1) // num_blocks


def largest_block(num_rows: int, block_rows: int) -> int:
    """Rows of the largest of ``blocks``."""
    return -(-num_rows // max(1, -(-num_rows // block_rows)))


def check_block_rows(block_rows: int) -> None:
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1 row, got {block_rows}")


class _FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, objective: Objective, support: Support, block_rows: int
    ) -> tuple[Tensor, ...]:
        num_rows, vocab_size = logits.shape
        want_gradient = bool(ctx.needs_input_grad[0])
        out = Columns(num_rows, logits)
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format) if want_gradient else None
        # Where the dtype allows it the gradient's own rows are the working buffer.
        shared = gradient is not None and gradient.dtype == working_dtype(logits)
        size = (0 if shared else largest_block(num_rows, block_rows), vocab_size)
        buffer = torch.empty(size, dtype=working_dtype(logits), device=logits.device)
        for start, end in blocks(num_rows, block_rows):
            block = gradient[start:end] if shared and gradient is not None else buffer[: end - start]
            block.copy_(logits[start:end])
            out.put(start, end, *solve_block(objective, block, support.rows(start, end), want_gradient=want_gradient))
            if gradient is not None and not shared:
                gradient[start:end] = block
        ctx.gradient = gradient
        ctx.mark_non_differentiable(*out.metrics.values())
        ctx.set_materialize_grads(False)
        return out.values, *out.metrics.values()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        scale, gradient = grad_outputs[0], ctx.gradient
        if scale is None or gradient is None:
            return None, None, None, None
        if bool((scale == 1.0).all()):
            return gradient, None, None, None
        return gradient * scale.unsqueeze(1).to(gradient.dtype), None, None, None
