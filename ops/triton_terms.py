"""The plain objectives per category, as device code in any float dtype: what ``ops.solve.terms`` and ``excess`` define.

p, q teacher and student, as logarithms; −inf where a category is absent
"""

# mypy: ignore-errors
# Parameters are tiles and compile-time constants, of which mypy knows nothing.

import triton
import triton.language as tl

from ops.formulas import Kind

FORWARD = tl.constexpr(Kind.FORWARD.value)
REVERSE = tl.constexpr(Kind.REVERSE.value)
MEAN = tl.constexpr(Kind.MEAN.value)
SKEWED = tl.constexpr(Kind.SKEWED.value)
SKEWED_REVERSE = tl.constexpr(Kind.SKEWED_REVERSE.value)
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)
"""Stands for the logarithm of 0: exp of it is 0, and products with it stay finite in float32."""


@triton.jit
def term(
    log_p,
    log_q,
    KIND: tl.constexpr,
    SHARE: tl.constexpr,
    LOG_SHARE: tl.constexpr,
    LOG_REST: tl.constexpr,
    EXCESS: tl.constexpr,
):
    """A category's summand of the value, and of the derivative by log q. Where log q is −inf, so must log p be.

    KIND and SHARE are the objective's (``ops.formulas``), LOG_SHARE and LOG_REST the logarithms of SHARE and
    1 − SHARE. EXCESS: each summand a·log(a/b) − a + b, which is never negative, instead of a·log(a/b).
    """
    # With −inf out of the way no difference of two logarithms is NaN, and where both are absent it is 0.
    log_p, log_q = _lifted(log_p), _lifted(log_q)
    p, q = exp(log_p), exp(log_q)
    if KIND == FORWARD:
        value = _part(p, q, log_p - log_q, EXCESS)
        weight = -p
    elif KIND == REVERSE:
        ratio = log_q - log_p
        value = _part(q, p, ratio, EXCESS)
        weight = q * (ratio + 1.0)
    elif KIND == MEAN:
        log_m = _log_sum(log_p + LOG_SHARE, log_q + LOG_REST)
        m, ratio = exp(log_m), log_q - log_m
        of_p, of_q = _part(p, m, log_p - log_m, EXCESS), _part(q, m, ratio, EXCESS)
        value = of_p * SHARE + of_q * (1.0 - SHARE)
        weight = q * ratio * (1.0 - SHARE)
    elif KIND == SKEWED:
        log_m = _log_sum(log_p + LOG_SHARE, log_q + LOG_REST)
        value = _part(p, exp(log_m), log_p - log_m, EXCESS)
        weight = -p * exp(log_q - log_m) * (1.0 - SHARE)
    else:
        log_m = _log_sum(log_q + LOG_SHARE, log_p + LOG_REST)
        ratio = log_q - log_m
        value = _part(q, exp(log_m), ratio, EXCESS)
        weight = q * ratio + p * exp(ratio) * (1.0 - SHARE)
    return value, weight


@triton.jit
def log_or_minus_inf(x):
    """Of x ≥ 0."""
    return tl.where(x > 0.0, tl.log(tl.where(x > 0.0, x, 1.0)), float("-inf"))


@triton.jit
def finite(x):
    """−inf as 0."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def exp(x):
    """In float32 without the denormal results that ``tl.exp`` spends three more instructions on."""
    return tl.exp(x) if x.dtype.primitive_bitwidth == 64 else tl.exp2(x * LOG2_E)


@triton.jit
def _lifted(log_x):
    return tl.where(log_x == float("-inf"), LOWEST, log_x)


@triton.jit
def _part(a, b, log_ratio, EXCESS: tl.constexpr):
    """a·log(a/b), or its excess. Where a is 0, so is the product with whatever the logarithm is."""
    if EXCESS:
        NEAR: tl.constexpr = 1.0 if a.dtype.primitive_bitwidth == 64 else 0.5
        is_near = tl.abs(log_ratio) < NEAR
        near = a * _exp_rest(tl.where(is_near, log_ratio, 0.0))
        part = tl.where(is_near, near, a * log_ratio - a + b)
        part = tl.where(part < 0.0, 0.0, part)
    else:
        part = a * log_ratio
    return part


@triton.jit
def _exp_rest(x):
    """exp(−x) − 1 + x to the last digit, by its series x²/2 (1 − x/3 (1 − x/4 …)): |x| < 1, in float32 < ½."""
    if x.dtype.primitive_bitwidth == 64:
        rest = x * (-1.0 / 20) + 1.0
        for i in tl.static_range(17):
            rest = x * (-1.0 / (19 - i)) * rest + 1.0
    else:
        rest = x * (-1.0 / 181440) + 1.0 / 20160
        rest = rest * x - 1.0 / 2520
        rest = rest * x + 1.0 / 360
        rest = rest * x - 1.0 / 60
        rest = rest * x + 1.0 / 12
        rest = rest * x - 1.0 / 3
        rest = rest * x + 1.0
    return x * x * 0.5 * rest


@triton.jit
def _log_sum(x, y):
    """log(exp x + exp y) of finite numbers."""
    high, low = tl.maximum(x, y), tl.minimum(x, y)
    return high + tl.log(exp(low - high) + 1.0)
