"""A curve of any length in few points: what a run's history takes when it is kept for being looked at. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

MAX_POINTS = 500
"""More than a phone has columns, and than most screens have for one chart."""


class Curve:
    """Values over a growing ``x``. A point is the mean of neighbours as soon as there are more of them than fit.

    ``x`` that is not larger than the last one takes back what was from there on: a resumed run does steps again.

    Example::

        curve = Curve(max_points=4)
        for step in range(1, 7):
            curve.add(step, float(step))
        assert curve.points() == [(2, 1.5), (4, 3.5), (6, 5.5)]
    """

    def __init__(self, max_points: int = MAX_POINTS) -> None:
        if max_points < 2:
            raise ValueError(f"a curve needs at least 2 points, got {max_points}")
        self._max_points = max_points
        self._stride = 1
        """Values that a full point stands for."""
        self._points: list[_Point] = []

    def __len__(self) -> int:
        return len(self._points)

    def add(self, x: int, y: float | None) -> None:
        """``y`` that is None or not finite is a gap, unless a neighbour in its point has a value."""
        while self._points and self._points[-1].x >= x:
            self._points.pop()
        if not self._points or self._points[-1].num_values >= self._stride:
            if len(self._points) == self._max_points:
                self._halve()
            self._points.append(_Point(x))
        self._points[-1].add(x, y)

    def points(self) -> list[tuple[int, float | None]]:
        """(x of the last value, mean of the finite values), oldest first; at most ``max_points``."""
        return [(point.x, point.mean) for point in self._points]

    def _halve(self) -> None:
        self._points = [_merged(self._points[i : i + 2]) for i in range(0, len(self._points), 2)]
        self._stride *= 2


class _Point:
    __slots__ = ("num_finite", "num_values", "total", "x")

    def __init__(self, x: int) -> None:
        self.x = x
        self.num_values = 0
        self.num_finite = 0
        self.total = 0.0

    def add(self, x: int, y: float | None) -> None:
        self.x = x
        self.num_values += 1
        if y is not None and math.isfinite(y):
            self.num_finite += 1
            self.total += y

    @property
    def mean(self) -> float | None:
        return self.total / self.num_finite if self.num_finite else None


def _merged(points: Sequence[_Point]) -> _Point:
    one = _Point(points[-1].x)
    one.num_values = sum(point.num_values for point in points)
    one.num_finite = sum(point.num_finite for point in points)
    one.total = sum(point.total for point in points)
    return one
