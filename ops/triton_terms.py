"""The plain objectives per category, as device code in any float dtype: what ``ops.solve.terms`` and ``excess`` define.

    p, q teacher and student, as logarithms; −inf where a category is absent
"""

# mypy: ignore-errors
# Parameters are tiles and compile-time constants, of which mypy knows nothing.

import triton
import triton.language as tl

FORWARD = tl.constexpr(0)
REVERSE = tl.constexpr(1)
MEAN = tl.constexpr(2)
SKEWED = tl.constexpr(3)
SKEWED_REVERSE = tl.constexpr(4)


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

    KIND and SHARE are the objective's (``ops.triton_objectives``), LOG_SHARE and LOG_REST the logarithms of SHARE and
    1 − SHARE. EXCESS: each summand a·log(a/b) − a + b, which is never negative, instead of a·log(a/b).
    """
    p, q = tl.exp(log_p), tl.exp(log_q)
    if KIND == FORWARD:
        value = _part(p, q, _difference(log_p, log_q), EXCESS)
        weight = -p
    elif KIND == REVERSE:
        ratio = _difference(log_q, log_p)
        value = _part(q, p, ratio, EXCESS)
        weight = q * (ratio + 1.0)
    elif KIND == MEAN:
        log_m = _log_sum(log_p + LOG_SHARE, log_q + LOG_REST)
        m, ratio = tl.exp(log_m), _difference(log_q, log_m)
        of_p, of_q = _part(p, m, _difference(log_p, log_m), EXCESS), _part(q, m, ratio, EXCESS)
        value = of_p * SHARE + of_q * (1.0 - SHARE)
        weight = q * ratio * (1.0 - SHARE)
    elif KIND == SKEWED:
        log_m = _log_sum(log_p + LOG_SHARE, log_q + LOG_REST)
        value = _part(p, tl.exp(log_m), _difference(log_p, log_m), EXCESS)
        weight = -p * tl.exp(_difference(log_q, log_m)) * (1.0 - SHARE)
    else:
        log_m = _log_sum(log_q + LOG_SHARE, log_p + LOG_REST)
        ratio = _difference(log_q, log_m)
        value = _part(q, tl.exp(log_m), ratio, EXCESS)
        weight = q * ratio + p * tl.exp(ratio) * (1.0 - SHARE)
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
def _part(a, b, log_ratio, EXCESS: tl.constexpr):
    log_ratio = tl.where(a == 0.0, 0.0, log_ratio)
    if EXCESS:
        is_close = tl.abs(log_ratio) < 1.0
        close = a * _exp_rest(tl.where(is_close, log_ratio, 0.0))
        part = tl.where(is_close & (a != 0.0), close, a * log_ratio - a + b)
        part = tl.where(part < 0.0, 0.0, part)
    else:
        part = a * log_ratio
    return part


@triton.jit
def _exp_rest(x):
    """exp(−x) − 1 + x of |x| < 1 to the last digit: its series, x²/2 (1 − x/3 (1 − x/4 (1 − …)))."""
    LAST: tl.constexpr = 20 if x.dtype.primitive_bitwidth == 64 else 11
    rest = x * (-1.0 / LAST) + 1.0
    for i in tl.static_range(LAST - 3):
        rest = x * (-1.0 / (LAST - 1 - i)) * rest + 1.0
    return x * x * 0.5 * rest


@triton.jit
def _log_sum(x, y):
    """log(exp x + exp y)."""
    high, low = tl.maximum(x, y), tl.minimum(x, y)
    return tl.where(high == float("-inf"), high, high + tl.log(tl.exp(low - finite(high)) + 1.0))


@triton.jit
def _difference(log_a, log_b):
    """log a − log b, and 0 where a category is absent from both."""
    neither = (log_a == float("-inf")) & (log_b == float("-inf"))
    return tl.where(neither, 0.0, log_a) - tl.where(neither, 0.0, log_b)
