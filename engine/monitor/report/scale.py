"""From numbers to places on a drawing: round ticks, and a linear scale. Pure."""

from __future__ import annotations

import math
import sys

import msgspec

_STEPS = (1.0, 2.0, 5.0, 10.0)


class Scale(msgspec.Struct, frozen=True, kw_only=True):
    """Maps [low, high] onto [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        # Halves: the difference of two large floats may be too large for one.
        span = self.high / 2 - self.low / 2
        share = (value / 2 - self.low / 2) / span if span > 0.0 else 0.5
        return self.start + share * (self.end - self.start)


def ticks(low: float, high: float, *, count: int = 4, whole: bool = False) -> list[float]:
    """Round numbers at equal distances, about ``count`` of them, from at or below ``low`` to at or above ``high``.

    Both must be finite. When they are equal, there is room on both sides. ``whole``: no fractions.
    """
    if high <= low:
        room = abs(low) / 2 or 0.5
        low, high = max(low - room, -sys.float_info.max), min(high + room, sys.float_info.max)
    raw = (high - low) / max(1, count - 1)
    if not sys.float_info.min * 10 < raw < math.inf:  # the ends of what a float can hold
        return [low, high]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((s * power for s in _STEPS if s * power >= raw * 0.999), 10.0 * power)
    if whole:
        step = max(1.0, round(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    found = [index * step for index in range(first, max(last, first + 1) + 1)]
    return found if all(map(math.isfinite, found)) else [low, high]


def tick_texts(values: list[float]) -> list[str]:
    """As few digits as tell them apart."""
    largest = max(map(abs, values))
    step = abs(values[1] - values[0]) if len(values) > 1 else largest
    if largest and (largest >= 1e6 or step < 1e-4):
        return [_scientific(value) for value in values]
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
    return [f"{value:,.{digits}f}" if value else "0" for value in values]


def _scientific(value: float) -> str:
    if not value:
        return "0"
    mantissa, _, exponent = f"{value:.2g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa
