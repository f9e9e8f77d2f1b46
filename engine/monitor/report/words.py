"""What a curve says in one sentence: for those who cannot see the drawing, and for paper. Pure."""

from __future__ import annotations

from engine.monitor.report.document import Curve, Point, Series


def curve_words(curve: Curve) -> str:
    """Ends, extremes and gaps of every series."""
    return " ".join(_series_words(series, is_alone=len(curve.series) == 1) for series in curve.series)


def _series_words(series: Series, *, is_alone: bool) -> str:
    name = "" if is_alone else f"{series.name}: "
    finite = [point for point in series.points if point.y is not None]
    if not finite:
        return f"{name}no finite value."
    first, last = _middle(finite[0]), _middle(finite[-1])
    if len(finite) == 1:
        text = f"{name}once, {first:.4g}."
    else:
        lows = [point.y if point.low is None else point.low for point in finite]
        highs = [point.y if point.high is None else point.high for point in finite]
        low, high = min(v for v in lows if v is not None), max(v for v in highs if v is not None)
        text = f"{name}from {first:.4g} to {last:.4g}, lowest {low:.4g}, highest {high:.4g}."
    # Not how many: a point may stand for many steps.
    return f"{text} Gaps: not finite." if len(finite) < len(series.points) else text


def _middle(point: Point) -> float:
    assert point.y is not None
    return point.y
