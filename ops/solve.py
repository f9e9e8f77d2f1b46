"""The objectives on few categories: value and gradient in closed form, float64.

    B rows      N columns and the tail: N + 1 categories      p, q teacher and student

Every objective here is a sum over categories of a(p, q) log(a/b), so its gradient on the logits is w − q Σw with
w = q ∂/∂q the derivative by log q: what a plain "q − p" forgets is the factor Σw where it is not 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ops.coarse import TAIL_FLOOR, Coarse, at_temperature, coarsen, finite, merge, spread
from ops.objectives import (
    JSD,
    ForwardKL,
    Mixture,
    Objective,
    Plain,
    ReverseKL,
    SampledReverseKL,
    SkewKL,
    StudentTopKReverseKL,
    leaves,
)
from ops.scores import Support

MAX_LOG_RATIO = 50.0
"""Of two probabilities of one token, as a factor in ``SampledReverseKL``: e⁵⁰ is 5e21, and its square fits float32."""


@dataclass(frozen=True, eq=False)
class Conditions:
    """What the caller adds to an objective, of the same B rows."""

    temperature: float = 1.0
    square_temperature: bool = False
    behaviour_logprobs: Tensor | None = None
    """[B]."""
    token_weights: Tensor | None = None
    """[B]."""
    clamp: float | None = None

    def __post_init__(self) -> None:
        if not (0.0 < self.temperature < math.inf):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if self.clamp is not None and not self.clamp > 0.0:
            raise ValueError(f"clamp must be above 0 nats, or None for no limit, got {self.clamp}")

    def what_is_wrong(self, num_rows: int) -> str:
        """A tensor of another number of rows, in one sentence; or nothing."""
        for name, tensor in (("behaviour_logprobs", self.behaviour_logprobs), ("token_weights", self.token_weights)):
            if tensor is not None and tensor.shape != (num_rows,):
                return f"{name} must be ({num_rows},) as the student has {num_rows} rows, got {tuple(tensor.shape)}"
        return ""

    def rows(self, start: int, end: int) -> Conditions:
        return Conditions(
            temperature=self.temperature,
            square_temperature=self.square_temperature,
            behaviour_logprobs=None if self.behaviour_logprobs is None else self.behaviour_logprobs[start:end],
            token_weights=None if self.token_weights is None else self.token_weights[start:end],
            clamp=self.clamp,
        )

    def apply(self, value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """T² factor, then the clamp, then the weights."""
        if self.square_temperature and self.temperature != 1.0:
            factor = self.temperature * self.temperature
            value, gradient = value * factor, gradient * factor
        if self.clamp is not None:
            gradient = gradient.masked_fill((value > self.clamp).unsqueeze(1), 0.0)
            value = value.clamp(max=self.clamp)
        if self.token_weights is not None:
            weights = self.token_weights.double()
            value, gradient = value * weights, gradient * weights.unsqueeze(1)
        return value, gradient


def solve(
    objective: Objective, log_q: Tensor, base: Coarse, support: Support, conditions: Conditions
) -> tuple[Tensor, Tensor]:
    """Value [B] in nats and gradient [B, C+1] with respect to the coarse logits; the gradient of a row sums to 0.

    Args:
        log_q: [B, C+1] the student on the columns of ``support`` and the tail (``ops.coarse.student``).
        base: both models on the columns of S alone, at temperature 1.
    """
    num_base, temperature = support.num_base, conditions.temperature
    on_base = at_temperature(base, temperature)
    total: tuple[Tensor, Tensor] | None = None
    for weight, leaf in leaves(objective):
        if isinstance(leaf, StudentTopKReverseKL):
            assert support.student_places is not None  # whoever made the support has asked ``wants_student_ids``
            keep = support.student_places < leaf.k
            kept_log_q = merge(log_q, keep)
            logprobs = support.logprobs.masked_fill(~keep, -torch.inf)
            view = at_temperature(coarsen(kept_log_q, logprobs), temperature)
            value, gradient = _compare(ReverseKL(), view)
            gradient = spread(gradient, log_q, kept_log_q, keep)
        else:
            if isinstance(leaf, SampledReverseKL):
                ids = support.ids[:, :num_base]
                is_sampled = (ids == support.sampled_ids.unsqueeze(1)) & (ids >= 0)
                value, gradient = _estimate(leaf, on_base, is_sampled, conditions.behaviour_logprobs)
            else:
                assert not isinstance(leaf, Mixture)
                value, gradient = _compare(leaf, on_base)
            gradient = spread(gradient, log_q, base.log_q, num_base)
        if weight != 1.0:
            value, gradient = value * weight, gradient * weight
        total = (value, gradient) if total is None else (total[0] + value, total[1] + gradient)
    assert total is not None
    value, gradient = total
    return conditions.apply(value, gradient if temperature == 1.0 else gradient / temperature)


def wants_student_ids(objective: Objective) -> int:
    """How many of the student's most likely ids the objective looks at; 0: it does not."""
    return max((leaf.k for _, leaf in leaves(objective) if isinstance(leaf, StudentTopKReverseKL)), default=0)


Summands: TypeAlias = list[tuple[float, Tensor, Tensor, Tensor]]


def terms(objective: Plain, log_p: Tensor, log_q: Tensor) -> tuple[Summands, Tensor]:
    """The sum that the objective is, per category.

    Args:
        log_p, log_q: [B, N]; where log q is −inf, so is log p.

    Returns:
        (c, a, b, log a/b) of each c Σ a log(a/b); and the derivative of their sum by log q, log p and normalisation
        taken as constants.
    """
    p, q = log_p.exp(), log_q.exp()
    match objective:
        case ForwardKL() | JSD(beta=0.0) | SkewKL(alpha=0.0, reverse=False):
            return [(1.0, p, q, _difference(log_p, log_q))], -p
        case ReverseKL() | JSD(beta=1.0) | SkewKL(alpha=0.0, reverse=True):
            ratio = _difference(log_q, log_p)
            return [(1.0, q, p, ratio)], q * (ratio + 1.0)
        case JSD(beta=beta):
            log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
            m, ratio = log_m.exp(), _difference(log_q, log_m)
            both = [(beta, p, m, _difference(log_p, log_m)), (1.0 - beta, q, m, ratio)]
            return both, (1.0 - beta) * q * ratio
        case SkewKL(alpha=alpha, reverse=reverse):
            first, second = (log_q, log_p) if reverse else (log_p, log_q)
            log_m = torch.logaddexp(first + math.log(alpha), second + math.log1p(-alpha))
            ratio = _difference(first, log_m)
            slope = (1.0 - alpha) * p * _difference(log_q, log_m).exp()
            if not reverse:
                return [(1.0, p, log_m.exp(), ratio)], -slope
            # ∂/∂q = log(q/m) + 1 − α q/m, and what is 1 − α q/m if not (1 − α) p/m.
            return [(1.0, q, log_m.exp(), ratio)], q * ratio + slope
    raise TypeError(f"{objective!r} does not compare two distributions")


def needs_floor(objective: Plain) -> bool:
    """It takes the logarithm of the teacher's probability, where that is 0 as well."""
    match objective:
        case ReverseKL() | JSD(beta=1.0) | SkewKL(alpha=0.0, reverse=True):
            return True
        case _:
            return False


def excess(a: Tensor, b: Tensor, log_ratio: Tensor) -> Tensor:
    """a·log(a/b) − a + b, elementwise, never negative.

    Both sides of a divergence sum to 1, so − a + b adds up to nothing; with it every term is ≥ 0 and small terms keep
    their digits, where Σ a·log(a/b) cancels and may end below 0.
    """
    log_ratio = torch.where(a == 0.0, 0.0, log_ratio)  # a·log a is 0 at a = 0, also where log a is −inf
    close = a * (log_ratio + torch.expm1(-log_ratio.clamp(-1.0, 1.0)))
    apart = a * log_ratio - a + b
    return torch.where((log_ratio.abs() < 1.0) & (a != 0.0), close, apart).clamp_(min=0.0)


def _compare(objective: Plain, view: Coarse) -> tuple[Tensor, Tensor]:
    log_p, log_q = view.log_p, view.log_q
    if objective.tail == "ignore":
        everywhere = log_q.exp()
        log_p, log_q = _without_tail(view.raw_log_p), _without_tail(log_q[:, :-1])
        parts, weight = terms(objective, log_p, log_q)
        value = sum(c * (a * torch.where(a == 0.0, 0.0, log_ratio)).sum(dim=1) for c, a, _, log_ratio in parts)
        assert isinstance(value, Tensor)
        # The softmax runs over the whole vocabulary though the sum does not.
        return value, weight - everywhere * weight.sum(dim=1, keepdim=True)
    if objective.tail == "renormalise":
        log_p, log_q = _on_support(log_p), _on_support(log_q)
    if needs_floor(objective):
        log_p = _with_tail_floor(log_p, log_q)
    parts, weight = terms(objective, log_p, log_q)
    value = sum(c * excess(a, b, log_ratio).sum(dim=1) for c, a, b, log_ratio in parts)
    assert isinstance(value, Tensor)
    q = log_q.exp()
    # Divided by Σq, which is 1 but for rounding: so the gradient's sum vanishes to the last digit.
    mean = weight.sum(dim=1, keepdim=True) / q.sum(dim=1, keepdim=True).clamp(min=0.5)
    return value, weight - q * mean


def _estimate(
    objective: SampledReverseKL, view: Coarse, is_sampled: Tensor, behaviour_logprobs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``is_sampled``: [B, N] the column of y, if there is one."""
    is_sampled = is_sampled & (view.log_q[:, :-1] != -torch.inf)
    log_q_y = torch.where(is_sampled, view.log_q[:, :-1], 0.0).sum(dim=1)
    log_p_y = torch.where(is_sampled, view.raw_log_p, 0.0).sum(dim=1)
    is_there = is_sampled.any(dim=1)
    if objective.estimator == "k1":
        value = slope = log_q_y - log_p_y
    else:
        log_ratio = log_p_y - log_q_y
        capped = log_ratio.clamp(max=MAX_LOG_RATIO)
        ratio = capped.exp()
        value = torch.expm1(capped) + ratio * (log_ratio - capped) - log_ratio
        slope = 1.0 - ratio
    if behaviour_logprobs is not None:
        weight = (log_q_y - behaviour_logprobs.double()).clamp(max=MAX_LOG_RATIO).exp()
        if objective.clip_ratio is not None:
            weight = weight.clamp(max=objective.clip_ratio)
        value, slope = value * weight, slope * weight
    # A row without y may have anything in behaviour_logprobs.
    value, slope = torch.where(is_there, value, 0.0), torch.where(is_there, slope, 0.0).unsqueeze(1)
    return value, slope * (torch.nn.functional.pad(is_sampled, (0, 1)).double() - view.log_q.exp())


def _difference(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log a − log b, and 0 where a category is absent from both."""
    return torch.where((log_a == -torch.inf) & (log_b == -torch.inf), 0.0, log_a - log_b)


def _without_tail(log_p: Tensor) -> Tensor:
    return torch.nn.functional.pad(log_p, (0, 1), value=-torch.inf)


def _on_support(log_p: Tensor) -> Tensor:
    """Conditioned on not being the tail."""
    log_p_S = log_p[:, :-1]
    return _without_tail(log_p_S - finite(log_p_S.logsumexp(dim=1, keepdim=True)))


def _with_tail_floor(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The teacher's tail no smaller than the floor where the student has a tail."""
    tail = torch.where(log_q[:, -1:] == -torch.inf, log_p[:, -1:], log_p[:, -1:].clamp(min=math.log(TAIL_FLOOR)))
    return torch.cat((log_p[:, :-1], tail), dim=1)
