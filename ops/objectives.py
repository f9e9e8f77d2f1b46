"""Which divergence is minimised, as values. Arithmetic is in ``ops.solve``, the definition in ``ops.reference``.

    P teacher, Q student      p, q of one category      S the teacher's top-k and the sampled token      y that token

Sums are over the categories that the tail leaves: S and the bucket, or S alone. Gradients on their logits are w − q Σw,
w the derivative of a sum by log q: the chain rule through the softmax (under "ignore" that of the whole vocabulary).
docs/objectives.md says when to use which.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Tail = Literal["bucket", "renormalise", "ignore"]
"""What happens to the probability outside S.

"bucket": S and one category more, which holds the rest of both models. A true divergence, of a coarsening: never
    negative, zero when the models agree on S, and mass that leaks out of S costs something.
"renormalise": both models conditioned on S. A true divergence too, but it does not see how much mass lies outside S.
"ignore": the sum over S only, of both models' full probabilities. May be negative.
"""


@dataclass(frozen=True)
class ForwardKL:
    """KL(P ‖ Q) = Σ p log(p/q): the student must cover what the teacher does. Hinton et al., arXiv 1503.02531.

    w = −p, so the gradient is q Σp − p.
    """

    tail: Tail = "bucket"

    def __post_init__(self) -> None:
        _check_tail(self.tail)


@dataclass(frozen=True)
class ReverseKL:
    """KL(Q ‖ P) = Σ q log(q/p): the student must stay where the teacher is. MiniLLM (Gu et al., arXiv 2306.08543).

    w = q (log(q/p) + 1), so the gradient is q (log(q/p) − KL) where q sums to 1.
    """

    tail: Tail = "bucket"

    def __post_init__(self) -> None:
        _check_tail(self.tail)


@dataclass(frozen=True)
class JSD:
    """β KL(P ‖ M) + (1 − β) KL(Q ‖ M) with M = β P + (1 − β) Q; bounded by log 2 for β = ½.

    β = 0 is ``ForwardKL`` and β = 1 is ``ReverseKL``, as in GKD (Agarwal et al., arXiv 2306.13649) and in TRL. (The
    formula itself vanishes at both ends; divided by 1 − β or β it has these limits.) w = (1 − β) q log(q/m).
    """

    beta: float = 0.5
    tail: Tail = "bucket"

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta must lie in [0, 1], got {self.beta}")
        _check_tail(self.tail)


@dataclass(frozen=True)
class SkewKL:
    """KL(P ‖ α P + (1 − α) Q); reversed, KL(Q ‖ α Q + (1 − α) P). DistiLLM (Ko et al., arXiv 2402.03898).

    No log ratio exceeds log 1/α, which tames the gradient where the models hardly overlap. α = 0 is the plain KL.
    With m what is compared with, w = −(1 − α) p q/m; reversed, w = q log(q/m) + (1 − α) p q/m.
    """

    alpha: float = 0.1
    reverse: bool = False
    tail: Tail = "bucket"

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha < 1.0:
            raise ValueError(f"alpha must lie in [0, 1), got {self.alpha}; at 1 both sides are one model")
        _check_tail(self.tail)


@dataclass(frozen=True)
class StudentTopKReverseKL:
    """KL(Q ‖ P) on the student's k most likely ids alone, and one category that holds the rest of both models.

    ``ReverseKL("bucket")`` with these ids in place of S, value and gradient. Sees what the student says where the
    teacher's list does not reach. The choice of ids carries no gradient: the ids are constants of the step. The
    teacher's values there come through ``TeacherScores.extra_logprobs``.
    """

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1 id, got {self.k}")


@dataclass(frozen=True)
class SampledReverseKL:
    """An estimate of KL(Q ‖ P) from the sampled token alone, which is what a teacher without top-k lists can give.

    With w = min(q(y)/μ(y), ``clip_ratio``), μ the distribution that y was drawn from (``behaviour_logprobs``), and
    w = 1 when that is not given::

        "k1"   value w (log q(y) − log p(y))            gradient w (log q(y) − log p(y)) ∇ log q(y)
        "k3"   value w (p/q − 1 − log p/q), at y        gradient w (1 − p/q) ∇ log q(y)

    The gradient of k1 is the score-function one (REINFORCE), whose mean over y is that of the KL: the gradient of
    w̄ Ā log q(y), with w and the advantage A = log q − log p as constants, and not that of the value, whose mean is 0.
    The gradient of k3 is that of its value with w constant. The mean of k3's value is the KL, too (Schulman 2020,
    joschu.net/blog/kl-approx.html), but that of its gradient is the gradient of KL(P ‖ Q).

    Beyond p/q = e⁵⁰ k3 follows its tangent, and w stays at e⁵⁰, so that nothing overflows. A row without a sampled
    token, or with one that either model rules out (−inf), has value 0 and gradient 0.
    """

    estimator: Literal["k1", "k3"] = "k1"
    clip_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.estimator not in ("k1", "k3"):
            raise ValueError(f"estimator must be 'k1' or 'k3', got {self.estimator!r}")
        if self.clip_ratio is not None and not self.clip_ratio > 0.0:
            raise ValueError(f"clip_ratio must be above 0, or None for no limit, got {self.clip_ratio}")


@dataclass(frozen=True, init=False, repr=False)
class Mixture:
    """Σ w · objective, value and gradient, in one pass: ``Mixture((0.5, ForwardKL()), (0.5, ReverseKL()))``.

    No weight is negative.
    """

    parts: tuple[tuple[float, Objective], ...]

    def __init__(self, *parts: tuple[float, Objective]) -> None:
        if not parts:
            raise ValueError("a Mixture needs at least one (weight, objective)")
        for part in parts:
            if not (isinstance(part, tuple) and len(part) == 2 and isinstance(part[1], get_args(Objective))):
                raise ValueError(f"a Mixture is made of (weight, objective) pairs, got {part!r}")
            if not (0.0 <= part[0] < math.inf):
                raise ValueError(f"a weight in a Mixture must be finite and not negative, got {part[0]}")
        object.__setattr__(self, "parts", tuple((float(weight), objective) for weight, objective in parts))

    def __repr__(self) -> str:
        return f"Mixture({', '.join(map(repr, self.parts))})"


Objective: TypeAlias = ForwardKL | ReverseKL | JSD | SkewKL | StudentTopKReverseKL | SampledReverseKL | Mixture
Plain: TypeAlias = ForwardKL | ReverseKL | JSD | SkewKL
"""Those that compare the two models on S, and on a whole vocabulary just as well."""


def leaves(objective: Objective) -> Iterator[tuple[float, Objective]]:
    """The objective as a weighted sum of ones that are not mixtures."""
    if not isinstance(objective, Mixture):
        yield 1.0, objective
        return
    for weight, part in objective.parts:
        for inner, leaf in leaves(part):
            yield weight * inner, leaf


def _check_tail(tail: str) -> None:
    if tail not in get_args(Tail):
        raise ValueError(f"tail must be one of {', '.join(map(repr, get_args(Tail)))}, got {tail!r}")


def leaves_a_bucket(objective: Objective) -> bool:
    """Whether all of it compares S and a bucket: with a list of all V that is the divergence of the vocabularies."""
    return all(isinstance(leaf, get_args(Plain)) and leaf.tail == "bucket" for _, leaf in leaves(objective))
