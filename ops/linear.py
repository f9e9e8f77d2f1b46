"""A divergence fused with the language-model head: logits exist one block of rows at a time.

    T positions      D hidden size      V vocabulary      B ≤ block_rows rows of a block      z = h Wᵀ + b

Per block three matrix products, all of them needed by any method: z = h Wᵀ (forward), dh = dz W and dW += dzᵀ h
(backward). The gradient dz takes the place of z in one buffer that all blocks share, and dW grows in place. Where
``ops.kernels.head_for`` has a kernel for it, products and the work on rows are one pass (``ops.native_head``);
elsewhere torch makes the products, before and after that work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.divergence import Divergence, check_block_rows, pose
from ops.kernels import head_for
from ops.listed import Listed
from ops.native_head import NativeHead
from ops.objectives import Objective
from ops.scores import TeacherScores
from ops.solve import Conditions
from ops.solved import METRICS, Columns, blocks, largest_block, working_dtype


def linear_divergence(
    objective: Objective,
    hidden: Tensor,
    head_weight: Tensor,
    scores: TeacherScores | Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    square_temperature: bool = False,
    behaviour_logprobs: Tensor | None = None,
    token_weights: Tensor | None = None,
    clamp: float | None = None,
    tp_group: Any = None,
    vocab_size: int | None = None,
    vocab_start: int | None = None,
    reduce_hidden_grad: bool = True,
    block_rows: int | None = None,
) -> Divergence:
    """``divergence`` of the logits ``hidden @ head_weight.T + bias``, which are never whole.

    With dz [T, V] the gradient of ``divergence``: dh = dz W, dW = dzᵀ h and db = Σ_T dz, by blocks. To compute them
    along with the values is an idea of Liger's (Hsu et al., arXiv 2410.10989).

    Values and gradients of all inputs are computed in the forward pass, for a gradient of 1 on each value (the trainer
    sums; weights of single tokens belong into ``token_weights``). The backward pass returns them as they are, scales
    them when all values get one gradient, and computes the blocks of the head's gradient again when rows get different
    ones: right in each case, fast in the first two.

    On several ranks the head is cut along V and hidden states are the same on each, as in a column-parallel linear
    layer: values and the gradient of ``hidden`` are whole on every rank, that of the head is the shard's. Each block
    makes the three all-reduces of ``divergence``. Under sequence parallelism gather the hidden states first, and
    reduce-scatter their gradient: with ``reduce_hidden_grad=False`` it is left as this rank's summand for that.

    Args:
        hidden: [T, D]. When its dtype differs from the head's (autocast), products are made in the dtype of ``hidden``.
        head_weight: [V, D], or this rank's [W, D]; may be the tied embedding.
        scores: of the same T positions; or the teacher's logits [T, V] (this rank's [T, W]).
        bias: [V] (this rank's [W]) or None.
        reduce_hidden_grad: sum the gradient of ``hidden`` over ``tp_group``, in its dtype.
        block_rows: largest number of full-vocabulary rows held at a time. None: two ninths of T, 64 to 256. On CUDA,
            where each block reads and writes the whole gradient of the head and a product of few rows is slow, what
            fits 640 MiB of logits, but at least 1024 rows and no more than half of T; 2048 with a ``tp_group``.

        The others are those of ``divergence``.

    Raises:
        ValueError: as ``divergence``.
    """
    conditions = Conditions(
        temperature=temperature,
        square_temperature=square_temperature,
        behaviour_logprobs=behaviour_logprobs,
        token_weights=token_weights,
        clamp=clamp,
    )
    head = Head(
        objective,
        hidden,
        head_weight,
        scores,
        bias,
        conditions,
        tp_group,
        vocab_size,
        vocab_start,
        block_rows=block_rows,
    )
    values, *metrics = _FromHidden.apply(  # type: ignore[no-untyped-call]
        hidden, head_weight, bias, head, tp_group if reduce_hidden_grad else None
    )
    return Divergence(values=values, metrics=dict(zip(METRICS, metrics, strict=True)))


def linear_divergence_with_gradients(
    objective: Objective,
    hidden: Tensor,
    head_weight: Tensor,
    scores: TeacherScores | Tensor,
    bias: Tensor | None = None,
    *,
    hidden_grad: Tensor,
    head_grad: Tensor | None,
    bias_grad: Tensor | None = None,
    temperature: float = 1.0,
    square_temperature: bool = False,
    behaviour_logprobs: Tensor | None = None,
    token_weights: Tensor | None = None,
    clamp: float | None = None,
    tp_group: Any = None,
    vocab_size: int | None = None,
    vocab_start: int | None = None,
    reduce_hidden_grad: bool = True,
    block_rows: int | None = None,
    workspace: Tensor | None = None,
) -> Divergence:
    """The same outside autograd, for who accumulates gradients of the *sum* of the values himself.

    Args:
        hidden_grad: [T, D] as ``hidden``, overwritten.
        head_grad: [V, D] as ``head_weight``, *added to*; None: not wanted.
        bias_grad: [V], added to; None: not wanted.
        workspace: [R, V] of the dtype of ``hidden``, for blocks of at most R ≤ ``block_rows`` rows. Kept from call to
            call it spares the page faults of a fresh one, on CPU 25 ms for 50 MB; None: made here.

        The others are those of ``linear_divergence``.

    Raises:
        ValueError: as ``divergence``, or a gradient has another shape than what it is of.
    """
    conditions = Conditions(
        temperature=temperature,
        square_temperature=square_temperature,
        behaviour_logprobs=behaviour_logprobs,
        token_weights=token_weights,
        clamp=clamp,
    )
    if workspace is not None:
        block_rows = workspace.shape[0] if block_rows is None else min(block_rows, workspace.shape[0])
    wrong = ""
    for name, gradient, shape in (
        ("hidden_grad", hidden_grad, hidden.shape),
        ("head_grad", head_grad, head_weight.shape),
        ("bias_grad", bias_grad, head_weight.shape[:1]),
    ):
        if gradient is not None and gradient.shape != shape:
            wrong = f"{name} must be {tuple(shape)}, got {tuple(gradient.shape)}"
    head = Head(
        objective,
        hidden,
        head_weight,
        scores,
        bias,
        conditions,
        tp_group,
        vocab_size,
        vocab_start,
        block_rows=block_rows,
        wrong=wrong,
    )
    gradients = Gradients(hidden=hidden_grad, weight=head_grad, bias=bias_grad)
    with torch.no_grad():
        out = head.run(hidden, head_weight, bias, gradients, workspace=workspace)
        if reduce_hidden_grad and tp_group is not None:
            dist.all_reduce(hidden_grad, group=tp_group)
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
    """A linear head with a problem behind it, and the block loop over both. Holds none of the tensors."""

    def __init__(
        self,
        objective: Objective,
        hidden: Tensor,
        weight: Tensor,
        scores: TeacherScores | Tensor,
        bias: Tensor | None,
        conditions: Conditions,
        tp_group: Any,
        vocab_size: int | None,
        vocab_start: int | None,
        *,
        block_rows: int | None,
        wrong: str = "",
    ) -> None:
        """
        Args:
            wrong: what the caller has found wrong already; all ranks must be told (``ops.divergence.pose``).
        """
        if block_rows is None:
            # Ranks must agree, and their widths need not.
            block_rows = _default_block_rows(hidden, None if tp_group is not None else len(weight))
        check_block_rows(block_rows)
        if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            wrong = (
                f"head_weight must be [V, D] and bias [V], got {tuple(weight.shape)} and "
                f"{None if bias is None else tuple(bias.shape)}"
            )
        elif hidden.dim() != 2 or hidden.shape[1] != weight.shape[1]:
            wrong = f"hidden must be [T, {weight.shape[1]}], got {tuple(hidden.shape)}"
        self.block_rows = block_rows
        self.problem = pose(
            objective,
            scores,
            conditions,
            num_rows=hidden.shape[0],
            width=weight.shape[0],
            dtype=hidden.dtype,
            device=hidden.device,
            tp_group=tp_group,
            vocab_size=vocab_size,
            vocab_start=vocab_start,
            block_rows=block_rows,
            wrong=wrong,
        )

    def run(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gradients: Gradients,
        *,
        workspace: Tensor | None = None,
    ) -> Columns:
        """All blocks: values, metrics, and the gradients that are wanted."""
        with torch.autocast(hidden.device.type, enabled=False):  # the dtypes here are chosen, not guessed
            return self._run(hidden, weight.to(hidden.dtype), bias, gradients, workspace)

    def _run(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, gradients: Gradients, workspace: Tensor | None
    ) -> Columns:
        num_rows, num_columns = hidden.shape[0], self.problem.num_columns
        # Rows of padding take no part: 0 times what they hold may be NaN.
        weight = weight[:num_columns]
        head_bias = None if bias is None else bias[:num_columns].to(hidden.dtype)
        out = Columns(num_rows, hidden)
        size = largest_block(num_rows, self.block_rows)
        if isinstance(self.problem, Listed) and self.problem.reads_by_kernel:
            native = head_for(
                hidden,
                weight,
                head_bias,
                hidden_grad=gradients.hidden,
                weight_grad=None if gradients.weight is None else gradients.weight[:num_columns],
                bias_grad=None if gradients.bias is None else gradients.bias[:num_columns],
                num_rows=size,
                workspace=workspace,
            )
            if native is not None:
                self._run_by_kernel(self.problem, native, hidden, gradients, out)
                return out
        if workspace is None:
            workspace = torch.empty((size, num_columns), dtype=hidden.dtype, device=hidden.device)
        for start, end in blocks(num_rows, self.block_rows):
            logits, rows = workspace[: end - start, :num_columns], slice(start, end)
            if head_bias is None:
                torch.mm(hidden[rows], weight.t(), out=logits)
            else:
                torch.addmm(head_bias, hidden[rows], weight.t(), out=logits)
            solved = self.problem.solve(logits, start, end)
            out.put(start, end, solved)
            if not gradients.wanted:
                continue
            solved.write(logits, logits, None if gradients.row_scale is None else gradients.row_scale[rows])
            if gradients.bias is not None:
                gradients.bias[:num_columns].add_(logits.sum(dim=0, dtype=working_dtype(logits)))
            if gradients.hidden is not None:
                torch.mm(logits, weight, out=gradients.hidden[rows])
            if gradients.weight is not None:
                _add_product(gradients.weight[:num_columns], logits.t(), hidden[rows])
        return out

    def _run_by_kernel(
        self, problem: Listed, native: NativeHead, hidden: Tensor, gradients: Gradients, out: Columns
    ) -> None:
        for start, end in blocks(len(hidden), self.block_rows):
            rows = slice(start, end)
            block = native.block(hidden[rows], None if gradients.hidden is None else gradients.hidden[rows])
            solved = problem.solve(block.logits, start, end, block)
            out.put(start, end, solved)
            if gradients.wanted:
                solved.write(
                    block.logits, block.logits, None if gradients.row_scale is None else gradients.row_scale[rows]
                )
        native.end()
        for written in (gradients.hidden, gradients.weight, gradients.bias):
            if written is not None:
                torch.autograd.graph.increment_version(written)  # behind autograd's back


def _default_block_rows(hidden: Tensor, num_columns: int | None) -> int:
    if not hidden.is_cuda:
        # Products of fewer than 64 rows are slow, of more than 256 no faster, of multiples of 8 fastest.
        return min(256, max(64, len(hidden) // 72 * 16))
    if num_columns is None:
        return 2048
    # On an H100, of 512 to 4096, 2048 rows of 151936 columns were the fastest, and 4096 of 32000.
    fit = 640 * 2**20 // max(1, num_columns * hidden.element_size())
    return max(1024, min(fit, -(-len(hidden) // 2)))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without a temporary where the dtypes allow."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.add_(torch.mm(left, right))


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, sum_hidden_over: Any
    ) -> tuple[Tensor, ...]:
        need_hidden, need_weight, need_bias, *_ = ctx.needs_input_grad
        gradients = Gradients(
            hidden=torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None,
            weight=torch.zeros_like(weight, memory_format=torch.contiguous_format) if need_weight else None,
            bias=torch.zeros_like(bias) if need_bias and bias is not None else None,
        )
        out = head.run(hidden, weight, bias, gradients)
        if gradients.hidden is not None and sum_hidden_over is not None:
            dist.all_reduce(gradients.hidden, group=sum_hidden_over)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.head, ctx.gradients = head, gradients
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
        if _is_one(scale):
            return gradients.hidden, gradients.weight, gradients.bias, None, None
        hidden, weight, bias = ctx.saved_tensors
        by_row = None if gradients.hidden is None else gradients.hidden * scale.unsqueeze(1).to(gradients.hidden.dtype)
        if _is_uniform(scale):
            return by_row, _times(gradients.weight, scale[0]), _times(gradients.bias, scale[0]), None, None
        again = Gradients(
            weight=None if gradients.weight is None else torch.zeros_like(gradients.weight),
            bias=None if gradients.bias is None else torch.zeros_like(gradients.bias),
            row_scale=scale,
        )
        if again.wanted:
            ctx.head.run(hidden, weight, bias, again)
        return by_row, again.weight, again.bias, None, None


def _is_one(scale: Tensor) -> bool:
    """Asked on CPU alone: on CUDA the answer costs more than the product that it may spare."""
    return scale.device.type == "cpu" and bool((scale == 1.0).all())


def _is_uniform(scale: Tensor) -> bool:
    """What a sum or a mean sends back is one number, expanded: that is seen without reading it."""
    return scale.numel() > 0 and (scale.stride(0) == 0 or bool((scale == scale[0]).all()))


def _times(gradient: Tensor | None, scale: Tensor) -> Tensor | None:
    return None if gradient is None else gradient * scale.to(gradient.dtype)
