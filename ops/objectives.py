"""Which divergence is minimised, as values. Arithmetic is in ``ops.coarse``, the definition in ``ops.reference``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Tail = Literal["bucket", "renormalise", "ignore"]
"""What happens to the probability outside S, the teacher's top-k and the sampled token.

"bucket": S and one category more, which holds the rest of both models. A true divergence, of a coarsening: never
    negative, zero when the models agree on S, and mass that leaks out of S costs something.
"renormalise": both models conditioned on S. A true divergence too, but it does not see how much mass lies outside S.
"ignore": the sum over S only, of both models' full probabilities. May be negative.
"""


@dataclass(frozen=True)
class ForwardKL:
    """KL(teacher ‖ student): the student must cover what the teacher does."""

    tail: Tail = "bucket"

    def __post_init__(self) -> None:
        _check_tail(self.tail)


@dataclass(frozen=True)
class ReverseKL:
    """KL(student ‖ teacher): the student must stay where the teacher is."""

    tail: Tail = "bucket"

    def __post_init__(self) -> None:
        _check_tail(self.tail)


Objective = ForwardKL | ReverseKL


def _check_tail(tail: str) -> None:
    if tail not in get_args(Tail):
        raise ValueError(f"tail must be one of {', '.join(map(repr, get_args(Tail)))}, got {tail!r}")
