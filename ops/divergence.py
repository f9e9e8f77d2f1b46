"""A divergence between a teacher and student logits, per position, with its gradient.

    T positions    V vocabulary    W columns of this rank (V, on one)    K teacher's top-k    z logits    q = softmax(z)

The forward pass reads the logits once and keeps a few numbers per row. The backward pass reads them again and writes
the gradient once, scaled by what comes from above. Where the logits come from a linear head, ``ops.linear`` does
without a [T, V] tensor altogether.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.kernels import dense_for
from ops.listed import Listed
from ops.objectives import Objective, leaves_a_bucket
from ops.scores import TeacherScores, check_ids, lists_all
from ops.shards import find_shard
from ops.solve import Conditions, wants_student_ids
from ops.solved import METRICS, Columns, Problem


@dataclass(frozen=True, eq=False)
class Divergence:
    """What ``divergence`` and ``linear_divergence`` return."""

    values: Tensor
    """[T] nats, float32 (float64 when the logits are); carries the gradient."""
    metrics: dict[str, Tensor]
    """[T] each, dtype of ``values``, no gradient, at temperature 1, the same on every rank:

    teacher_mass, student_mass: probability of the teacher's top-k under each model's full softmax.
    topk_overlap: share of the teacher's top-k that is among the student's as many largest.
    teacher_entropy, student_entropy: nats, with the tail as one category, so a lower bound of the full entropy.
    student_logprob: nats, of the sampled token under the student's full softmax; 0 where there is none.

    With a teacher's logits the list is the whole vocabulary: masses and overlap are 1, entropies exact, and nothing was
    sampled.
    """


def divergence(
    objective: Objective,
    logits: Tensor,
    scores: TeacherScores | Tensor,
    *,
    temperature: float = 1.0,
    square_temperature: bool = False,
    behaviour_logprobs: Tensor | None = None,
    token_weights: Tensor | None = None,
    clamp: float | None = None,
    tp_group: Any = None,
    vocab_size: int | None = None,
    vocab_start: int | None = None,
    inplace: bool = False,
    block_rows: int = 256,
) -> Divergence:
    """Divergence of each position from logits.

    With p the teacher, q the student, S the teacher's top-k and the sampled token, p_tail = 1 − Σ_S p and q_tail
    likewise, under ``tail="bucket"``::

        ForwardKL   Σ_S p log(p/q) + p_tail log(p_tail/q_tail)
            ∂/∂z_v = q_v − p_v for v in S, q_v − p_tail q_v / q_tail otherwise
        ReverseKL   Σ_S q log(q/p) + q_tail log(q_tail/p_tail)
            ∂/∂z_v = q_v (log(q_v/p_v) − value) for v in S, q_v (log(q_tail/p_tail) − value) otherwise
        all         Σ over S and the tail of f(p, q);  ∂/∂z_v = w_v − q_v Σ w,  w = q ∂f/∂q

    The other objectives' f are in their docstrings, with sources. ``ops.objectives.Tail`` says what the other tails
    are; ``ops.coarse`` what happens at −inf, at rounding and at temperatures.

    Args:
        logits: [T, V], or this rank's [T, W], any float dtype; not changed unless ``inplace``. −inf marks columns
            outside the vocabulary.
        scores: of the same T positions, the same on every rank. Or the teacher's logits [T, V] (this rank's [T, W]):
            then the divergence is over the whole vocabulary, whatever the objective's tail.
        temperature: τ > 0, of both models: log-probabilities of the categories are divided by τ and scaled to sum to 1
            again. Whole vocabularies see softmax(z/τ). Divides the gradient by about τ².
        square_temperature: value and gradient times τ², which keeps the gradient's size (Hinton et al.,
            arXiv 1503.02531).
        behaviour_logprobs: [T] nats, of the sampled tokens under what drew them; read by ``SampledReverseKL`` alone.
        token_weights: [T] factors of value and gradient; constants.
        clamp: upper limit of a token's value, before its weight; above it the gradient is 0.
        tp_group: process group whose ranks hold a shard each, in order; widths may differ. Three small all-reduces
            forward, none backward (``ops.shards``); ``StudentTopKReverseKL`` without ``extra_ids`` gathers once more.
            The values are the same on every rank, and each must take the same gradient of them.
        vocab_size: V where columns are padded: a column at or beyond it is not there, whatever it holds, and its
            gradient is 0.
        vocab_start: id of this rank's first column, with ``vocab_size``; None: the ranks tell each other their widths.
        inplace: the backward pass writes the gradient over the logits (over a leaf's, too), instead of beside them.
            Whoever needs the logits after that, a second backward pass for one, gets autograd's error about a tensor
            that was modified.
        block_rows: rows of a teacher's logits that are worked on at a time, in several copies in float32 (float64 for
            float64 logits). With ``TeacherScores`` the copies are of a megabyte.

    Raises:
        ValueError: shapes disagree, an id is out of range, or the objective needs what is not given. If one rank of
            ``tp_group`` raises because of its shapes, all do (not where ``vocab_start`` is given: then nobody asks).
    """
    conditions = Conditions(
        temperature=temperature,
        square_temperature=square_temperature,
        behaviour_logprobs=behaviour_logprobs,
        token_weights=token_weights,
        clamp=clamp,
    )
    check_block_rows(block_rows)
    wrong = "" if logits.dim() == 2 else f"logits must be [T, V], got {tuple(logits.shape)}"
    if not logits.is_floating_point():
        wrong = f"logits must be of a float dtype, got {logits.dtype}"
    if not wrong and inplace and not has_contiguous_rows(logits):
        wrong = "inplace=True needs logits whose rows are contiguous"
    problem = pose(
        objective,
        scores,
        conditions,
        num_rows=logits.shape[:1].numel(),
        width=logits.shape[-1:].numel(),
        dtype=logits.dtype,
        device=logits.device,
        tp_group=tp_group,
        vocab_size=vocab_size,
        vocab_start=vocab_start,
        block_rows=block_rows,
        wrong=wrong,
    )
    values, *metrics = _FromLogits.apply(logits, problem, inplace)  # type: ignore[no-untyped-call]
    return Divergence(values=values, metrics=dict(zip(METRICS, metrics, strict=True)))


def pose(
    objective: Objective,
    scores: TeacherScores | Tensor,
    conditions: Conditions,
    *,
    num_rows: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    tp_group: Any,
    vocab_size: int | None,
    vocab_start: int | None,
    block_rows: int,
    wrong: str,
) -> Problem:
    """Check everything, on all ranks alike.

    Args:
        wrong: what the caller has found wrong already.
    """
    theirs = scores.device if isinstance(scores, Tensor) else scores.top_ids.device
    if theirs != device:  # a kernel in C would read another device's addresses
        wrong = wrong or f"the teacher's scores are on {theirs} and the student on {device}; bring them together"
    shard = find_shard(
        width,
        device=device,
        group=tp_group,
        vocab_size=vocab_size,
        vocab_start=vocab_start,
        alike=(num_rows, block_rows),
        problem=wrong or _what_is_wrong(objective, scores, conditions, num_rows=num_rows, width=width),
    )
    sampled_ids = None
    if isinstance(scores, TeacherScores):
        if not leaves_a_bucket(objective) or not lists_all(scores, shard.vocab_size):
            return Listed(objective, scores, shard, conditions)
        # The bucket is empty: the list is the teacher's logits but for a constant, and as such no id is searched for.
        check_ids(scores.sampled_ids, shard.vocab_size)
        sampled_ids = scores.sampled_ids
        # A shard of padding may lie behind the last id.
        scores = scores.top_logprobs[:, shard.start : shard.start + shard.num_columns]
    return dense_for(
        objective, scores, shard, conditions, student_dtype=dtype, block_rows=block_rows, sampled_ids=sampled_ids
    )


def check_block_rows(block_rows: int) -> None:
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1 row, got {block_rows}")


def _what_is_wrong(
    objective: Objective, scores: TeacherScores | Tensor, conditions: Conditions, *, num_rows: int, width: int
) -> str:
    """One sentence, or nothing."""
    if not isinstance(objective, get_args(Objective)):
        return f"the objective must be one of ops, as ForwardKL(), got {objective!r}"
    if not isinstance(scores, TeacherScores):
        if scores.shape != (num_rows, width):
            return f"the teacher's logits must be {(num_rows, width)} as the student's, got {tuple(scores.shape)}"
    elif scores.num_rows != num_rows:
        return f"the student has {num_rows} rows and the scores have {scores.num_rows}; they must agree"
    elif num_student := wants_student_ids(objective):
        extra = scores.extra_logprobs
        if extra is None or extra.shape[1] < num_student:
            return (
                f"StudentTopKReverseKL(k={num_student}) needs the teacher's log-probabilities of the student's "
                f"{num_student} most likely ids in scores.extra_logprobs [T, E ≥ k], got "
                f"{None if extra is None else tuple(extra.shape)}"
            )
    return conditions.what_is_wrong(num_rows)


class _FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, problem: Problem, inplace: bool) -> tuple[Tensor, ...]:
        rows = logits if has_contiguous_rows(logits) else logits.contiguous()
        with torch.autocast(rows.device.type, enabled=False):  # the dtypes here are chosen, not guessed
            solved = problem.solve(rows, 0, len(rows))
        out = Columns.of(solved, rows)
        ctx.solved, ctx.inplace = solved, inplace
        ctx.save_for_backward(rows)
        ctx.mark_non_differentiable(*out.metrics.values())
        ctx.set_materialize_grads(False)
        return out.values, *out.metrics.values()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        if scale is None:
            return None, None, None
        logits: Tensor = ctx.saved_tensors[0].detach()  # autograd raises when they have changed since
        out = logits if ctx.inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
        with torch.autocast(out.device.type, enabled=False):
            ctx.solved.write(out, logits, scale)
        if ctx.inplace:
            torch.autograd.graph.increment_version(out)  # a kernel may write behind autograd's back
        return out, None, None


def has_contiguous_rows(logits: Tensor) -> bool:
    return logits.shape[1] < 2 or logits.stride(1) == 1
