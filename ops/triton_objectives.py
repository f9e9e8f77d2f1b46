"""A plain objective as the compile-time constants that ``ops.triton_terms`` takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from ops.objectives import JSD, ForwardKL, Objective, Plain, ReverseKL, SkewKL
from ops.triton_terms import FORWARD, MEAN, REVERSE, SKEWED, SKEWED_REVERSE


@dataclass(frozen=True, kw_only=True)
class Formula:
    """Named as the parameters of the kernels."""

    KIND: int
    SHARE: float = 0.5
    LOG_SHARE: float = 0.0
    LOG_REST: float = 0.0


def has_formula(objective: Objective) -> bool:
    """It is a plain one."""
    return isinstance(objective, get_args(Plain))


def formula_of(objective: Plain) -> Formula:
    match objective:
        case ForwardKL() | JSD(beta=0.0) | SkewKL(alpha=0.0, reverse=False):
            return Formula(KIND=FORWARD.value)
        case ReverseKL() | JSD(beta=1.0) | SkewKL(alpha=0.0, reverse=True):
            return Formula(KIND=REVERSE.value)
        case JSD(beta=share):
            return _mixed(MEAN.value, share)
        case SkewKL(alpha=share, reverse=False):
            return _mixed(SKEWED.value, share)
        case SkewKL(alpha=share, reverse=True):
            return _mixed(SKEWED_REVERSE.value, share)
    raise TypeError(f"{objective!r} does not compare two distributions")


def _mixed(kind: int, share: float) -> Formula:
    return Formula(KIND=kind, SHARE=share, LOG_SHARE=math.log(share), LOG_REST=math.log1p(-share))
