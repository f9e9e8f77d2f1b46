"""One curve as inline SVG: axes with round numbers, lines with a band of extremes, gaps where there is no number.
Decides where everything lies; colours are classes of ``style``.

The drawing is as wide as a phone and grows with its column. Series differ in dashes, not only in colour.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from engine.monitor.report.document import Curve, Point, Series
from engine.monitor.report.scale import Scale, tick_texts, ticks
from engine.monitor.report.text import safe

WIDTH, HEIGHT = 360, 200
_TOP, _BOTTOM, _RIGHT = 10, 34, 12
_CHARACTER = 6.2
"""Width of a digit of the axes' type."""
_MAX_DOTS = 60
"""More dots than that are a line."""


def curve_svg(curve: Curve, *, name: str, description: str) -> str:
    """The drawing, with ``name`` as its accessible title; an empty string when no series has a finite value."""
    finite = [point for series in curve.series for point in series.points if point.y is not None]
    if not finite:
        return ""
    ys = [y for point in finite for y in (point.y, point.low, point.high) if y is not None]
    # Room above it: on the frame it would not be seen.
    ys += [curve.limit * 1.1] if curve.limit is not None else []
    ys += [0.0] if curve.from_zero else []
    y_ticks = ticks(min(ys), max(ys))
    texts = tick_texts(y_ticks)
    left = 10 + _CHARACTER * max(len(text) for text in texts)
    x_ticks, x_scale = _x_axis(finite, left)
    y_scale = Scale(low=y_ticks[0], high=y_ticks[-1], start=HEIGHT - _BOTTOM, end=_TOP)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{safe(name)}">',
        f"<title>{safe(name)}</title><desc>{safe(description)}</desc>",
    ]
    for value, text in zip(y_ticks, texts, strict=True):
        y = y_scale(value)
        parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="end" x="{left - 5:.1f}" y="{y + 3.5:.1f}">{text}</text>')
    for value, text in zip(x_ticks, tick_texts(x_ticks), strict=True):
        x = x_scale(value)
        parts.append(f'<path class="grid" d="M{x:.1f} {HEIGHT - _BOTTOM}v4"/>')
        parts.append(f'<text class="middle" x="{x:.1f}" y="{HEIGHT - _BOTTOM + 16}">{text}</text>')
    parts.append(f'<text class="end" x="{WIDTH - _RIGHT}" y="{HEIGHT - 4}">{safe(curve.x_name)}</text>')
    parts += _marks(curve, x_scale)
    for index, series in enumerate(curve.series):
        parts += _series(series, index, x_scale, y_scale)
    if curve.limit is not None:
        y = y_scale(curve.limit)
        parts.append(f'<path class="limit" d="M{left:.1f} {y:.1f}H{WIDTH - _RIGHT}"/>')
    return "".join([*parts, "</svg>"])


def _x_axis(points: Sequence[Point], left: float) -> tuple[list[float], Scale]:
    low, high = min(point.x for point in points), max(point.x for point in points)
    if low == high:
        low, high = low - 1, high + 1
    inside = [tick for tick in ticks(low, high, count=6, whole=True) if low <= tick <= high]
    return inside or [low], Scale(low=low, high=high, start=left + 4, end=WIDTH - _RIGHT - 4)


def _marks(curve: Curve, x_scale: Scale) -> Iterator[str]:
    for mark in curve.marks:
        if x_scale.low <= mark.x <= x_scale.high:
            place = f"M{x_scale(mark.x):.1f} {_TOP}V{HEIGHT - _BOTTOM}"
            yield f'<path class="mark" d="{place}"><title>{safe(mark.name)}</title></path>'


def _series(series: Series, index: int, x_scale: Scale, y_scale: Scale) -> Iterator[str]:
    kind = f"s{index % 4}"
    num_dots = sum(point.y is not None for point in series.points)
    for run in _runs(series.points):
        band = [(point.x, *extremes) for point in run if (extremes := _extremes(point)) is not None]
        if len(band) > 1:
            upper = [(x_scale(x), y_scale(high)) for x, _, high in band]
            lower = [(x_scale(x), y_scale(low)) for x, low, _ in reversed(band)]
            yield f'<path class="band {kind}" d="M{_path([*upper, *lower])}Z"/>'
        places = [(x_scale(point.x), y_scale(point.y)) for point in run if point.y is not None]
        if len(places) > 1:
            yield f'<path class="line {kind}" d="M{_path(places)}"/>'
        if num_dots <= _MAX_DOTS or len(places) == 1:
            yield from (f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="1.8"/>' for x, y in places)


def _runs(points: Iterable[Point]) -> Iterator[list[Point]]:
    """Neighbours without a gap between them."""
    for is_gap, run in itertools.groupby(points, key=lambda point: point.y is None):
        if not is_gap:
            yield list(run)


def _extremes(point: Point) -> tuple[float, float] | None:
    if point.low is None or point.high is None:
        return None if point.y is None else (point.y, point.y)
    return point.low, point.high


def _path(places: Iterable[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
