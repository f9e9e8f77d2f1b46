"""A plain objective as a few numbers, for the compiled kernels, which know no classes."""

from __future__ import annotations

import enum
import math
from dataclasses import asdict, dataclass
from typing import TypeGuard, get_args

from ops.coarse import TAIL_FLOOR
from ops.objectives import JSD, ForwardKL, Objective, Plain, ReverseKL, SkewKL, Tail


class Kind(enum.IntEnum):
    """Which sum over categories; ``native_terms.h`` has the same in the same order."""

    FORWARD = 0
    REVERSE = 1
    MEAN = 2
    SKEWED = 3
    SKEWED_REVERSE = 4


@dataclass(frozen=True, kw_only=True)
class Formula:
    """What ``ops.solve.terms`` needs to know of an objective."""

    kind: Kind
    share: float = 0.5
    """β or α."""
    log_share: float = 0.0
    log_rest: float = 0.0
    """Logarithms of ``share`` and 1 − ``share``."""
    log_floor: float | None = None
    """Least logarithm of a teacher's probability that is 0; None: the formula has no use for it."""

    def constants(self) -> dict[str, float | None]:
        """Named as the parameters of the Triton kernels."""
        return {name.upper(): value for name, value in asdict(self).items()} | {"KIND": self.kind.value}


def has_formula(objective: Objective) -> TypeGuard[Plain]:
    """It is a plain one."""
    return isinstance(objective, get_args(Plain))


def formula_of(objective: Plain) -> Formula:
    match objective:
        case ForwardKL() | JSD(beta=0.0) | SkewKL(alpha=0.0, reverse=False):
            return Formula(kind=Kind.FORWARD)
        case ReverseKL() | JSD(beta=1.0) | SkewKL(alpha=0.0, reverse=True):
            return Formula(kind=Kind.REVERSE, log_floor=math.log(TAIL_FLOOR))
        case JSD(beta=share):
            return _mixed(Kind.MEAN, share)
        case SkewKL(alpha=share, reverse=False):
            return _mixed(Kind.SKEWED, share)
        case SkewKL(alpha=share, reverse=True):
            return _mixed(Kind.SKEWED_REVERSE, share)
    raise TypeError(f"{objective!r} does not compare two distributions")


def tail_index(tail: Tail) -> int:
    """Its place in ``Tail``; kernels have the same order."""
    return get_args(Tail).index(tail)


def _mixed(kind: Kind, share: float) -> Formula:
    return Formula(kind=kind, share=share, log_share=math.log(share), log_rest=math.log1p(-share))
