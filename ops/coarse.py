"""Both models on few categories: the columns of the support, and the tail. float64.

Everything a top-k objective needs of V logits z is the logits of the support and the log-sum-exp of all the others.
With these as C + 1 *coarse logits* u, softmax(u) is the student on S and on the tail, exactly and without a
subtraction 1 − Σq; and a gradient on u is a gradient on z, since ∂u_tail/∂z_v is the softmax among the tail. So large
work (``ops.rows``) and delicate work (these few columns) are apart. By the same rule an objective that looks at fewer
columns merges the others into its tail.

    B rows      C columns of the support      N columns that an objective looks at      p, q teacher and student

Conventions, shared with ``ops.reference``:

- A column where the student's logit is −inf is not part of the student's vocabulary: the teacher's mass there counts as
  tail.
- The teacher's tail is max(1 − Σp, 0), and p is scaled to sum to 1: rounded log-probabilities may sum to more than 1.
  Where its logarithm is needed (reverse KL), it is taken of at least ``TAIL_FLOOR``. Where the student has no tail at
  all (the columns are its whole vocabulary), the teacher has none either.
- A row without any named column has value 0 and gradient 0.
- A temperature τ divides the log-probabilities of the N + 1 categories of both models, which are then scaled to sum to
  1 again. For the whole vocabulary that is softmax(z/τ).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TAIL_FLOOR = 2.0**-46
"""About 1.4e-14: below what fp64 arithmetic on log-probabilities resolves, above what makes log p_tail meaningless."""


@dataclass(frozen=True, eq=False)
class Coarse:
    """Both models on N + 1 categories, the tail last; −inf where a category is absent. float64."""

    log_q: Tensor
    """[B, N+1]: the student, summing to 1."""
    log_p: Tensor
    """[B, N+1]: the teacher, summing to 1 with the tail."""
    raw_log_p: Tensor
    """[B, N]: the teacher as given, not scaled to sum to 1; at another temperature than 1, of ``log_p``."""


def student(support_logits: Tensor, tail_lse: Tensor) -> tuple[Tensor, Tensor]:
    """log q [B, C+1] and the log-sum-exp [B] of all logits.

    Args:
        support_logits: [B, C] float64; −inf where there is no column.
        tail_lse: [B] float64, log-sum-exp of the student's other logits; −inf when there are none.
    """
    u = torch.cat((support_logits, tail_lse.unsqueeze(1)), dim=1)
    return log_softmax(u), u.logsumexp(dim=1)


def coarsen(log_q: Tensor, teacher_logprobs: Tensor) -> Coarse:
    """The teacher on the student's categories, at temperature 1.

    Args:
        log_q: [B, N+1] float64.
        teacher_logprobs: [B, N] float64; −inf where there is no column.
    """
    raw_log_p = teacher_logprobs.masked_fill(log_q[:, :-1] == -torch.inf, -torch.inf)
    mass = raw_log_p.exp().sum(dim=1, keepdim=True)
    tail_p = (1.0 - mass).clamp_(min=0.0).masked_fill_(log_q[:, -1:] == -torch.inf, 0.0)
    log_p = torch.cat((raw_log_p, tail_p.log()), dim=1) - finite((mass + tail_p).log())
    return Coarse(log_q=log_q, log_p=log_p, raw_log_p=raw_log_p)


def at_temperature(view: Coarse, temperature: float) -> Coarse:
    if temperature == 1.0:
        return view
    log_p = log_softmax(view.log_p / temperature)
    return Coarse(log_q=log_softmax(view.log_q / temperature), log_p=log_p, raw_log_p=log_p[:, :-1])


def merge(log_q: Tensor, keep: Tensor | int) -> Tensor:
    """The student where only some columns are looked at: [B, C+1] to [B, N+1].

    Args:
        keep: the number N of first columns to keep; or [B, C] bool, and N is C with −inf at the others.
    """
    if isinstance(keep, int):
        if keep == log_q.shape[1] - 1:
            return log_q
        return torch.cat((log_q[:, :keep], log_q[:, keep:].logsumexp(dim=1, keepdim=True)), dim=1)
    rest = torch.cat((log_q[:, :-1].masked_fill(keep, -torch.inf), log_q[:, -1:]), dim=1)
    return torch.cat((log_q[:, :-1].masked_fill(~keep, -torch.inf), rest.logsumexp(dim=1, keepdim=True)), dim=1)


def spread(gradient: Tensor, log_q: Tensor, merged_log_q: Tensor, keep: Tensor | int) -> Tensor:
    """A gradient on what ``merge`` made [B, N+1] as one on what it was made of [B, C+1]."""
    if isinstance(keep, int):
        if keep == log_q.shape[1] - 1:
            return gradient
        share = (log_q[:, keep:] - finite(merged_log_q[:, -1:])).exp()
        return torch.cat((gradient[:, :keep], gradient[:, -1:] * share), dim=1)
    share = (log_q - finite(merged_log_q[:, -1:])).exp()
    return torch.where(torch.nn.functional.pad(keep, (0, 1)), gradient, gradient[:, -1:] * share)


def entropy(log_p: Tensor) -> Tensor:
    """[B] nats of log-probabilities [B, N]; −inf entries count 0."""
    return -(log_p.exp() * finite(log_p)).sum(dim=1)


def log_softmax(u: Tensor) -> Tensor:
    """[B, N]; a row of nothing but −inf stays one."""
    empty = u.amax(dim=1, keepdim=True) == -torch.inf
    return u.log_softmax(dim=1).masked_fill_(empty, -torch.inf)


def finite(x: Tensor) -> Tensor:
    """−inf (the log of an empty sum) as 0; NaN and +inf stay and are seen by the caller."""
    return x.masked_fill(x == -torch.inf, 0.0)
