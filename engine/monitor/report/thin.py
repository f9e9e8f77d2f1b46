"""Long series of numbers as the few points that a screen can show. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from engine.monitor.report.document import Point

MAX_POINTS = 160
"""A curve is 360 units wide on a phone; closer points than two units apart cannot be told apart."""


def thin(values: Sequence[tuple[float, float | None]], *, limit: int = MAX_POINTS) -> tuple[Point, ...]:
    """At most ``limit`` points of (x, y), which are in the order of x.

    When there are more, neighbours become one point: it stands at the last x of its group, has the mean of their finite
    values, and their extremes beside it, so that no peak is lost. A group without a finite value is a gap.
    """
    pairs = [(x, y if y is not None and math.isfinite(y) else None) for x, y in values]
    if len(pairs) <= limit:
        return tuple(Point(x=x, y=y) for x, y in pairs)
    # The last one stays by itself: where a run ended is what people look for.
    body, last = pairs[:-1], pairs[-1]
    edges = [round(i * len(body) / (limit - 1)) for i in range(limit)]
    groups = [body[start:end] for start, end in itertools.pairwise(edges)]
    return (*(_one(group) for group in groups), Point(x=last[0], y=last[1]))


def _one(group: Sequence[tuple[float, float | None]]) -> Point:
    finite = [y for _, y in group if y is not None]
    if not finite:
        return Point(x=group[-1][0], y=None)
    return Point(x=group[-1][0], y=math.fsum(y / len(finite) for y in finite), low=min(finite), high=max(finite))
