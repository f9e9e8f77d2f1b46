"""The definition: float64, one row at a time, plain autograd. Slow on purpose; everything else is compared with it.

    P, Q teacher and student      S the teacher's top-k and the sampled token, each id once

The conventions on what is absent, on rounding and on temperature are those of ``ops.coarse``, written out again from
the formulas; nothing but constants is shared with what is fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ops.coarse import TAIL_FLOOR
from ops.objectives import (
    JSD,
    ForwardKL,
    Mixture,
    Objective,
    ReverseKL,
    SampledReverseKL,
    SkewKL,
    StudentTopKReverseKL,
)
from ops.scores import TeacherScores
from ops.solve import MAX_LOG_RATIO


def reference_divergence(
    objective: Objective,
    logits: Tensor,
    scores: TeacherScores | Tensor,
    *,
    temperature: float = 1.0,
    square_temperature: bool = False,
    behaviour_logprobs: Tensor | None = None,
    token_weights: Tensor | None = None,
    clamp: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """[T] float64 nats with gradient; arguments as in ``ops.divergence.divergence``, on one rank.

    The gradient is autograd's, of the value as written. The one exception is ``SampledReverseKL("k1")``, whose value is
    a number and whose gradient is the score function's: it is computed as w A log q(y) with w and A detached, and the
    value is put in its place.
    """
    num_rows = scores.num_rows if isinstance(scores, TeacherScores) else scores.shape[0]
    if num_rows != logits.shape[0]:
        raise ValueError(f"the student has {logits.shape[0]} rows and the scores have {num_rows}")
    rows = []
    for t in range(num_rows):
        z = logits[t, :vocab_size].double()
        if isinstance(scores, TeacherScores):
            behaviour = None if behaviour_logprobs is None else float(behaviour_logprobs[t])
            value = _listed(objective, z, scores, t, temperature, behaviour)
        else:
            value = _dense(objective, z, scores[t, :vocab_size].double(), temperature)
        if square_temperature:
            value = value * temperature**2
        if clamp is not None and float(value.detach()) > clamp:
            value = value.detach().clamp(max=clamp) + 0.0 * _zero(z)
        if token_weights is not None:
            value = value * token_weights[t].double()
        rows.append(value)
    return torch.stack(rows) if rows else logits.double().sum(dim=1)


def _listed(
    objective: Objective, z: Tensor, scores: TeacherScores, t: int, temperature: float, behaviour: float | None
) -> Tensor:
    if isinstance(objective, Mixture):
        parts = [w * _listed(part, z, scores, t, temperature, behaviour) for w, part in objective.parts]
        return torch.stack(parts).sum()

    teacher: dict[int, float] = {}
    _enlist(teacher, scores.top_ids[t], scores.top_logprobs[t])
    y = int(scores.sampled_ids[t])
    if y not in teacher:
        _enlist(teacher, scores.sampled_ids[t : t + 1], scores.sampled_logprobs[t : t + 1])
    if isinstance(objective, StudentTopKReverseKL):
        assert scores.extra_logprobs is not None
        k = objective.k
        ids = z.detach().topk(min(k, len(z))).indices if scores.extra_ids is None else scores.extra_ids[t, :k]
        known, teacher = teacher, {}
        _enlist(teacher, ids, scores.extra_logprobs[t, : len(ids)])
        # Two numbers for one id may differ by rounding: the list's counts.
        teacher = {i: known.get(i, logprob) for i, logprob in teacher.items()}

    support = [i for i, logprob in teacher.items() if logprob > -torch.inf and float(z[i].detach()) > -torch.inf]
    rest = [v for v in range(len(z)) if v not in support and float(z[v].detach()) > -torch.inf]
    if not support:
        return _zero(z)
    raw_log_P_S = torch.tensor([teacher[i] for i in support], dtype=torch.float64, device=z.device)
    log_Q = _log_softmax(_categories(z, support, rest))
    log_P = _whole_teacher(raw_log_P_S, has_rest=bool(rest))
    if temperature != 1.0:
        log_Q, log_P = _log_softmax(log_Q / temperature), _log_softmax(log_P / temperature)
        raw_log_P_S = log_P[: len(support)]
    log_Q_S = log_Q[: len(support)]

    if isinstance(objective, SampledReverseKL):
        if y not in support:
            return _zero(z)
        at = support.index(y)
        return _estimate(objective, log_Q_S[at], raw_log_P_S[at], behaviour)
    if isinstance(objective, StudentTopKReverseKL):
        objective = ReverseKL()
    if objective.tail == "renormalise":
        return _compare(objective, _log_softmax(log_P[: len(support)]), _log_softmax(log_Q_S))
    if objective.tail == "ignore":
        return _compare(objective, raw_log_P_S, log_Q_S)
    if rest and _is_reverse_kl(objective):
        log_P = torch.cat((log_P[:-1], log_P[-1:].clamp(min=math.log(TAIL_FLOOR))))
    return _compare(objective, log_P, log_Q)


def _dense(objective: Objective, z: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Over the whole vocabulary."""
    if isinstance(objective, Mixture):
        parts = [w * _dense(part, z, teacher, temperature) for w, part in objective.parts]
        return torch.stack(parts).sum()
    if isinstance(objective, StudentTopKReverseKL | SampledReverseKL):
        raise ValueError(f"{objective!r} needs TeacherScores")
    there = z.detach() > -torch.inf
    z, teacher = z[there], teacher[there]
    if not (teacher > -torch.inf).any():
        return _zero(z)
    log_Q, log_P = _log_softmax(z / temperature), _log_softmax(teacher / temperature)
    ruled_out = log_P == -torch.inf
    if _is_reverse_kl(objective) and ruled_out.any():
        # One category of probability TAIL_FLOOR.
        tail = log_Q[ruled_out].logsumexp(0, keepdim=True)
        log_Q = torch.cat((log_Q[~ruled_out], tail))
        log_P = torch.cat((log_P[~ruled_out], log_P.new_full((1,), math.log(TAIL_FLOOR))))
    return _compare(objective, log_P, log_Q)


def _enlist(teacher: dict[int, float], ids: Tensor, logprobs: Tensor) -> None:
    for i, logprob in zip(ids.tolist(), logprobs.double().tolist(), strict=True):
        if i >= 0:
            teacher[i] = logprob


def _categories(z: Tensor, support: Sequence[int], rest: Sequence[int]) -> Tensor:
    on_support = z[list(support)]
    return torch.cat((on_support, z[list(rest)].logsumexp(0, keepdim=True))) if rest else on_support


def _whole_teacher(log_P_S: Tensor, *, has_rest: bool) -> Tensor:
    """log P on S and, if there is one, the rest; scaled to sum to 1."""
    P_S = log_P_S.exp()
    if not has_rest:
        return log_P_S - P_S.sum().log()
    P = torch.cat((P_S, (1.0 - P_S.sum()).clamp(min=0.0).unsqueeze(0)))
    return torch.cat((log_P_S, P[-1:].log())) - P.sum().log()


def _log_softmax(x: Tensor) -> Tensor:
    return x.log_softmax(0)


def _is_reverse_kl(objective: Objective) -> bool:
    return (
        isinstance(objective, ReverseKL)
        or (isinstance(objective, JSD) and objective.beta == 1.0)
        or (isinstance(objective, SkewKL) and objective.reverse and objective.alpha == 0.0)
    )


def _compare(objective: Objective, log_P: Tensor, log_Q: Tensor) -> Tensor:
    """The formulas of ``ops.objectives``."""
    if isinstance(objective, ForwardKL):
        return _kl(log_P, log_Q)
    if isinstance(objective, ReverseKL):
        return _kl(log_Q, log_P)
    if isinstance(objective, JSD):
        beta = objective.beta
        if beta == 0.0:
            return _kl(log_P, log_Q)
        if beta == 1.0:
            return _kl(log_Q, log_P)
        log_M = _log_mixture(beta, log_P, log_Q)
        return beta * _kl(log_P, log_M) + (1.0 - beta) * _kl(log_Q, log_M)
    assert isinstance(objective, SkewKL)
    if objective.reverse:
        return _kl(log_Q, _log_mixture(objective.alpha, log_Q, log_P))
    return _kl(log_P, _log_mixture(objective.alpha, log_P, log_Q))


def _kl(log_A: Tensor, log_B: Tensor) -> Tensor:
    there = log_A.detach() > -torch.inf  # 0 log 0 is 0
    return (log_A[there].exp() * (log_A[there] - log_B[there])).sum()


def _log_mixture(weight: float, log_A: Tensor, log_B: Tensor) -> Tensor:
    """log(w A + (1 − w) B)."""
    if weight == 0.0:
        return log_B
    return torch.stack((log_A + math.log(weight), log_B + math.log(1.0 - weight))).logsumexp(0)


def _estimate(objective: SampledReverseKL, log_q: Tensor, log_p: Tensor, behaviour: float | None) -> Tensor:
    weight = 1.0
    if behaviour is not None:
        weight = float((log_q.detach() - behaviour).clamp(max=MAX_LOG_RATIO).exp())
        weight = weight if objective.clip_ratio is None else min(weight, objective.clip_ratio)
    if objective.estimator == "k1":
        advantage = (log_q - log_p).detach()
        value = weight * advantage
        return value + weight * advantage * (log_q - log_q.detach())
    log_ratio = log_p - log_q
    if float(log_ratio.detach()) > MAX_LOG_RATIO:
        return weight * (math.expm1(MAX_LOG_RATIO) + math.exp(MAX_LOG_RATIO) * (log_ratio - MAX_LOG_RATIO) - log_ratio)
    return weight * (log_ratio.expm1() - log_ratio)


def _zero(z: Tensor) -> Tensor:
    """0, with gradient 0."""
    return 0.0 * z.masked_fill(z == -torch.inf, 0.0).sum()
