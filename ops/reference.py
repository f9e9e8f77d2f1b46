"""The definition: float64, one row at a time, plain autograd. Slow on purpose; everything else is compared with it.

    P, Q teacher and student      S the teacher's top-k and the sampled token, each id once

The conventions on what is absent and on rounding are those of ``ops.coarse``, written out again from the formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.coarse import TAIL_FLOOR
from ops.objectives import ForwardKL, Objective
from ops.scores import TeacherScores


def reference_divergence(objective: Objective, logits: Tensor, scores: TeacherScores) -> Tensor:
    """[T] float64 nats with gradient; arguments as in ``ops.divergence.divergence``."""
    if scores.num_rows != logits.shape[0]:
        raise ValueError(f"the student has {logits.shape[0]} rows and the scores have {scores.num_rows}")
    rows = [_row(objective, logits[t].double(), scores, t) for t in range(logits.shape[0])]
    return torch.stack(rows) if rows else logits.double().sum(dim=1)


def _row(objective: Objective, z: Tensor, scores: TeacherScores, t: int) -> Tensor:
    listed = zip(scores.top_ids[t].tolist(), scores.top_logprobs[t].double().tolist(), strict=True)
    teacher = {i: logprob for i, logprob in listed if i >= 0}
    if int(scores.sampled_ids[t]) >= 0:
        teacher.setdefault(int(scores.sampled_ids[t]), float(scores.sampled_logprobs[t]))
    support = [i for i, logprob in teacher.items() if logprob > -torch.inf and float(z[i].detach()) > -torch.inf]
    rest = [v for v in range(len(z)) if v not in support and float(z[v].detach()) > -torch.inf]
    if not support:
        return z.new_zeros(()) * z.masked_fill(z == -torch.inf, 0.0).sum()
    present = z[torch.tensor(support + rest)]
    log_Q_S = z[torch.tensor(support)] - present.logsumexp(0)
    log_P_S = torch.tensor([teacher[i] for i in support], dtype=torch.float64)

    if objective.tail == "renormalise":
        return _kl(objective, log_P_S.log_softmax(0), log_Q_S.log_softmax(0))
    if objective.tail == "ignore":
        return _kl(objective, log_P_S, log_Q_S)
    if not rest:
        return _kl(objective, log_P_S.log_softmax(0), log_Q_S)
    log_Q_tail = z[torch.tensor(rest)].logsumexp(0) - present.logsumexp(0)
    P_S = log_P_S.exp().sum()
    total = P_S + (1.0 - P_S).clamp(min=0.0)
    P_tail = 1.0 - P_S / total
    if isinstance(objective, ForwardKL) and P_tail == 0.0:
        return _kl(objective, log_P_S - total.log(), log_Q_S)
    log_P = torch.cat((log_P_S - total.log(), P_tail.clamp(min=TAIL_FLOOR).log().unsqueeze(0)))
    return _kl(objective, log_P, torch.cat((log_Q_S, log_Q_tail.unsqueeze(0))))


def _kl(objective: Objective, log_P: Tensor, log_Q: Tensor) -> Tensor:
    if isinstance(objective, ForwardKL):
        return (log_P.exp() * (log_P - log_Q)).sum()
    return (log_Q.exp() * (log_Q - log_P)).sum()
