"""The divergences on C + 1 categories: the support and the tail. Values and gradients in float64, closed form.

Everything a top-k objective needs of V logits z is the logits of the support and the log-sum-exp of all the others.
With these as C + 1 *coarse logits* u, softmax(u) is the student on S and on the tail, exactly and without a
subtraction 1 − Σq; and a gradient on u is a gradient on z, since ∂u_tail/∂z_v is the softmax among the tail. So large
work (one pass over V) and delicate work (these few columns) are apart.

    T rows      C columns of the support S      p, q teacher and student      P = Σ_S p

Conventions, shared with ``ops.reference``:

- A column of S where the student's logit is −inf is not part of the student's vocabulary: the teacher's mass there
  counts as tail.
- The teacher's tail is max(1 − P, 0), and p is scaled to sum to 1: rounded log-probabilities may sum to more than 1.
  Where its logarithm is needed (ReverseKL), it is taken of at least ``TAIL_FLOOR``. Where the student has no tail at
  all (S is its whole vocabulary), the teacher has none either.
- A row without any named column has value 0 and gradient 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ops.objectives import ForwardKL, Objective

TAIL_FLOOR = 2.0**-46
"""About 1.4e-14: below what fp64 arithmetic on log-probabilities resolves, above what makes log p_tail meaningless."""


@dataclass(frozen=True, eq=False)
class Coarse:
    """Student and teacher on the C + 1 categories, the tail last. float64; probabilities of absent categories are 0."""

    log_q: Tensor
    """[T, C+1]: the student; −inf where absent."""
    log_p: Tensor
    """[T, C+1]: the teacher, summing to 1 with the tail; −inf where absent."""
    raw_log_p: Tensor
    """[T, C]: the teacher as given, on the columns that are present; −inf elsewhere."""
    student_lse: Tensor
    """[T]: log-sum-exp of all the student's logits; 0 when all are −inf."""


def coarsen(support_logits: Tensor, tail_lse: Tensor, teacher_logprobs: Tensor) -> Coarse:
    """Bring both models onto the C + 1 categories.

    Args:
        support_logits: [T, C] the student's, float64; not read where ``teacher_logprobs`` is −inf.
        tail_lse: [T] float64, log-sum-exp of the student's other logits; −inf when there are none.
        teacher_logprobs: [T, C] float64; −inf at columns that are not named.
    """
    present = (teacher_logprobs != -torch.inf) & (support_logits != -torch.inf)
    log_p_S = teacher_logprobs.masked_fill(~present, -torch.inf)
    has_tail = tail_lse != -torch.inf
    mass = log_p_S.exp().sum(dim=1)
    tail_p = torch.where(has_tail, (1.0 - mass).clamp(min=0.0), 0.0)
    log_total = _finite((mass + tail_p).log())
    log_p = torch.cat((log_p_S, tail_p.log().unsqueeze(1)), dim=1) - log_total.unsqueeze(1)

    u = torch.cat((support_logits.masked_fill(~present, -torch.inf), tail_lse.unsqueeze(1)), dim=1)
    # The largest is taken off first: u − lse with both near 10⁴ would lose four digits of a log q near 0.
    largest = _finite(u.amax(dim=1, keepdim=True))
    log_sum = _finite((u - largest).exp().sum(dim=1, keepdim=True).log())
    return Coarse(
        log_q=u - largest - log_sum, log_p=log_p, raw_log_p=log_p_S, student_lse=(largest + log_sum).squeeze(1)
    )


def solve(objective: Objective, coarse: Coarse) -> tuple[Tensor, Tensor]:
    """Value [T] in nats and gradient [T, C+1] with respect to the coarse logits; the gradient of a row sums to 0."""
    log_p, log_q = coarse.log_p, coarse.log_q
    if objective.tail == "ignore":
        return _solve_ignoring_tail(objective, coarse)
    if objective.tail == "renormalise":
        log_p, log_q = _on_support(log_p), _on_support(log_q)
    p, q = log_p.exp(), log_q.exp()
    if isinstance(objective, ForwardKL):
        return _excess(p, q, _difference(log_p, log_q)).sum(dim=1), q - p
    ratio = _difference(log_q, _with_tail_floor(log_p, log_q))
    # The mean of the ratio is the value too, but only this one makes the gradient's sum vanish to the last digit.
    mean = (q * ratio).sum(dim=1, keepdim=True) / q.sum(dim=1, keepdim=True).clamp(min=0.5)
    return _excess(q, p, ratio).sum(dim=1), q * (ratio - mean)


def entropy(log_p: Tensor) -> Tensor:
    """[T] nats of log-probabilities [T, N]; −inf entries count 0."""
    return -(log_p.exp() * _finite(log_p)).sum(dim=1)


def _solve_ignoring_tail(objective: Objective, coarse: Coarse) -> tuple[Tensor, Tensor]:
    log_q, q = coarse.log_q[:, :-1], coarse.log_q.exp()
    ratio = _difference(coarse.raw_log_p, log_q)
    # The softmax runs over the whole vocabulary though the sum does not, so ∂/∂u_j = w_j − q_j Σ_S w with w the
    # derivative by log q: the factor Σ_S w on q is what a plain "q − p" forgets.
    if isinstance(objective, ForwardKL):
        p = coarse.raw_log_p.exp()
        value, weight = (p * ratio).sum(dim=1), -p
    else:
        value, weight = -(q[:, :-1] * ratio).sum(dim=1), q[:, :-1] * (1.0 - ratio)
    gradient = -q * weight.sum(dim=1, keepdim=True)
    gradient[:, :-1] += weight
    return value, gradient


def _excess(a: Tensor, b: Tensor, log_ratio: Tensor) -> Tensor:
    """a·log(a/b) − a + b, elementwise, never negative.

    Both sides of a divergence sum to 1, so − a + b adds up to nothing; with it every term is ≥ 0 and small terms keep
    their digits, where Σ a·log(a/b) cancels and may end below 0.
    """
    log_ratio = torch.where(a == 0.0, 0.0, log_ratio)  # a·log a is 0 at a = 0, also where log a is −inf
    close = a * (log_ratio + torch.expm1(-log_ratio.clamp(-1.0, 1.0)))
    apart = a * log_ratio - a + b
    return torch.where((log_ratio.abs() < 1.0) & (a != 0.0), close, apart).clamp(min=0.0)


def _difference(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log a − log b, and 0 where a category is absent from both."""
    absent = (log_a == -torch.inf) & (log_b == -torch.inf)
    return torch.where(absent, 0.0, log_a - log_b)


def _on_support(log_p: Tensor) -> Tensor:
    """Conditioned on not being the tail."""
    log_p_S = log_p[:, :-1]
    conditioned = log_p_S - _finite(log_p_S.logsumexp(dim=1)).unsqueeze(1)
    return torch.nn.functional.pad(conditioned, (0, 1), value=-torch.inf)


def _with_tail_floor(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The teacher's tail no smaller than the floor where the student has a tail."""
    tail = torch.where(log_q[:, -1:] == -torch.inf, log_p[:, -1:], log_p[:, -1:].clamp(min=math.log(TAIL_FLOOR)))
    return torch.cat((log_p[:, :-1], tail), dim=1)


def _finite(x: Tensor) -> Tensor:
    """−inf (the log of an empty sum) as 0; NaN and +inf stay and are seen by the caller."""
    return x.masked_fill(x == -torch.inf, 0.0)
