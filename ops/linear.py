"""A divergence fused with the language-model head: logits exist one block of rows at a time.

    T positions      D hidden size      V vocabulary      B ≤ block_rows rows of a block      z = h Wᵀ + b

Per block three matrix products, all of them needed by any method: z = h Wᵀ (forward), dh = dz W and dW += dzᵀ h
(backward). The gradient dz takes the place of z in one buffer that all blocks share, and dW grows in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.block import METRICS, solve_block
from ops.divergence import Columns, Divergence, blocks, check_block_rows, largest_block, working_dtype
from ops.objectives import Objective
from ops.scores import Support, TeacherScores, support_of


def linear_divergence(
    objective: Objective,
    hidden: Tensor,
    head_weight: Tensor,
    scores: TeacherScores,
    bias: Tensor | None = None,
    *,
    block_rows: int = 256,
) -> Divergence:
    """``divergence`` of the logits ``hidden @ head_weight.T + bias``, which are never whole.

    Values and gradients of all inputs are computed in the forward pass, for a gradient of 1 on each value (the trainer
    sums). The backward pass returns them as they are, scales them when all values get one gradient, and computes the
    blocks of the head's gradient again when rows get different ones: right in each case, fast in the first two.

    Args:
        hidden: [T, D]. When its dtype differs from the head's (autocast), products are made in the dtype of ``hidden``.
        head_weight: [V, D]; may be the tied embedding.
        bias: [V] or None.
        scores: of the same T positions.
        block_rows: largest number of full-vocabulary rows held at a time.

    Raises:
        ValueError: shapes disagree or an id is out of range.
    """
    head = Head(head_weight, bias, objective=objective, block_rows=block_rows)
    support = head.support(hidden, scores)
    values, *metrics = _FromHidden.apply(hidden, head_weight, bias, head, support)  # type: ignore[no-untyped-call]
    return Divergence(values=values, metrics=dict(zip(METRICS, metrics, strict=True)))


def linear_divergence_with_gradients(
    objective: Objective,
    hidden: Tensor,
    head_weight: Tensor,
    scores: TeacherScores,
    bias: Tensor | None = None,
    *,
    hidden_grad: Tensor,
    head_grad: Tensor | None,
    bias_grad: Tensor | None = None,
    block_rows: int = 256,
    workspace: Tensor | None = None,
) -> Divergence:
    """The same outside autograd, for who accumulates gradients of the *sum* of the values himself.

    Args:
        hidden_grad: [T, D] as ``hidden``, overwritten.
        head_grad: [V, D] as ``head_weight``, *added to*; None: not wanted.
        bias_grad: [V], added to; None: not wanted.
        workspace: [R, V] of the dtype of ``hidden``, for blocks of at most R ≤ ``block_rows`` rows. Kept from call to
            call it spares the page faults of a fresh one, on CPU 25 ms for 50 MB; None: made here.

    Returns:
        Values and metrics without a gradient.
    """
    head = Head(
        head_weight.detach(), None if bias is None else bias.detach(), objective=objective, block_rows=block_rows
    )
    support = head.support(hidden, scores)
    with torch.no_grad():
        gradients = Gradients(hidden=hidden_grad, weight=head_grad, bias=bias_grad)
        out = head.run(hidden.detach(), support, gradients, workspace=workspace)
    return Divergence(values=out.values, metrics=out.metrics)


@dataclass(frozen=True, eq=False)
class Gradients:
    """Where the gradients go; None where one is not wanted."""

    hidden: Tensor | None = None
    """[T, D], overwritten."""
    weight: Tensor | None = None
    """[V, D], added to."""
    bias: Tensor | None = None
    """[V], added to."""
    row_scale: Tensor | None = None
    """[T]: gradient of each value; None: 1."""

    @property
    def wanted(self) -> bool:
        return self.hidden is not None or self.weight is not None or self.bias is not None


class Head:
    """A linear head and the block loop over it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, objective: Objective, block_rows: int) -> None:
        check_block_rows(block_rows)
        if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            raise ValueError(
                f"head_weight must be [V, D] and bias [V], got {tuple(weight.shape)} and "
                f"{None if bias is None else tuple(bias.shape)}"
            )
        self.weight, self.bias, self.objective, self.block_rows = weight, bias, objective, block_rows

    def support(self, hidden: Tensor, scores: TeacherScores) -> Support:
        if hidden.dim() != 2 or hidden.shape[1] != self.weight.shape[1]:
            raise ValueError(f"hidden must be [T, {self.weight.shape[1]}], got {tuple(hidden.shape)}")
        return support_of(scores, num_rows=hidden.shape[0], vocab_size=self.weight.shape[0])

    def run(
        self, hidden: Tensor, support: Support, gradients: Gradients, *, workspace: Tensor | None = None
    ) -> Columns:
        """All blocks: values, metrics, and the gradients that are wanted."""
        with torch.autocast(hidden.device.type, enabled=False):  # the dtypes here are chosen, not guessed
            return self._run(hidden, support, gradients, workspace)

    def _run(self, hidden: Tensor, support: Support, gradients: Gradients, workspace: Tensor | None) -> Columns:
        num_rows = hidden.shape[0]
        weight = self.weight.to(hidden.dtype)
        out = Columns(num_rows, hidden)
        block_rows = self.block_rows if workspace is None else min(self.block_rows, workspace.shape[0])
        block_shape = (largest_block(num_rows, block_rows), weight.shape[0])
        product = (
            torch.empty(block_shape, dtype=hidden.dtype, device=hidden.device)
            if workspace is None
            else workspace[: block_shape[0]]
        )
        working = working_dtype(hidden)
        logits = product if working == hidden.dtype else torch.empty(block_shape, dtype=working, device=hidden.device)
        for start, end in blocks(num_rows, block_rows):
            size, rows = end - start, slice(start, end)
            torch.mm(hidden[rows], weight.t(), out=product[:size])
            if logits is not product:
                logits[:size].copy_(product[:size])
            if self.bias is not None:
                logits[:size].add_(self.bias)
            solved = solve_block(
                self.objective, logits[:size], support.rows(start, end), want_gradient=gradients.wanted
            )
            out.put(start, end, *solved)
            if gradients.row_scale is not None:
                logits[:size].mul_(gradients.row_scale[rows].unsqueeze(1))
            if gradients.bias is not None:
                gradients.bias.add_(logits[:size].sum(dim=0))
            if logits is not product:
                product[:size].copy_(logits[:size])
            if gradients.hidden is not None:
                torch.mm(product[:size], weight, out=gradients.hidden[rows])
            if gradients.weight is not None:
                _add_product(gradients.weight, product[:size].t(), hidden[rows])
        return out


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without a temporary where the dtypes allow."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(torch.mm(left, right))


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, support: Support
    ) -> tuple[Tensor, ...]:
        need_hidden, need_weight, need_bias, *_ = ctx.needs_input_grad
        gradients = Gradients(
            hidden=torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None,
            weight=torch.zeros_like(weight, memory_format=torch.contiguous_format) if need_weight else None,
            bias=torch.zeros_like(bias) if need_bias and bias is not None else None,
        )
        out = head.run(hidden, support, gradients)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.head, ctx.support, ctx.gradients = head, support, gradients
        ctx.mark_non_differentiable(*out.metrics.values())
        ctx.set_materialize_grads(False)
        return out.values, *out.metrics.values()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        gradients: Gradients = ctx.gradients
        if scale is None:
            return None, None, None, None, None
        if bool((scale == 1.0).all()):
            return gradients.hidden, gradients.weight, gradients.bias, None, None
        hidden, weight, bias = ctx.saved_tensors
        by_row = None if gradients.hidden is None else gradients.hidden * scale.unsqueeze(1).to(gradients.hidden.dtype)
        if bool((scale == scale[0]).all()):
            return by_row, _times(gradients.weight, scale[0]), _times(gradients.bias, scale[0]), None, None
        again = Gradients(
            weight=None if gradients.weight is None else torch.zeros_like(gradients.weight),
            bias=None if gradients.bias is None else torch.zeros_like(gradients.bias),
            row_scale=scale,
        )
        if again.wanted:
            head: Head = ctx.head
            Head(weight, bias, objective=head.objective, block_rows=head.block_rows).run(hidden, ctx.support, again)
        return by_row, again.weight, again.bias, None, None


def _times(gradient: Tensor | None, scale: Tensor) -> Tensor | None:
    return None if gradient is None else gradient * scale.to(gradient.dtype)
