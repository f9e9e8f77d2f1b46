"""A set of moments, kept as disjoint intervals, small enough for a million of them. Pure; microseconds."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class Pieces:
    """The union of intervals, given in any order; quickest in the order of their ends.

    Example::

        busy = Pieces()
        busy.add(0, 20, "a")
        busy.add(10, 30, "b")       # overlaps: one piece, which begins with "a"
        busy.add(50, 60, "c")
        assert list(busy.gaps(5, 70)) == [(30, 50, "c"), (60, 70, "")]
        assert list(busy.within(25, 55)) == [(25, 30), (50, 55)]
    """

    def __init__(self) -> None:
        self._starts = array("q")
        self._ends = array("q")
        self._names: list[str] = []

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._ends, strict=True)

    @property
    def start(self) -> int:
        """Of the first piece; there must be one."""
        return self._starts[0]

    @property
    def end(self) -> int:
        """Of the last piece; there must be one."""
        return self._ends[-1]

    def add(self, start: int, end: int, name: str = "") -> None:
        """Join ``start`` to ``end`` and what it touches into one piece, named after what begins it."""
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            if self._starts[first] <= start:
                start, name = self._starts[first], self._names[first]
            end = max(end, self._ends[last - 1])
        self._starts[first:last] = array("q", (start,))
        self._ends[first:last] = array("q", (end,))
        self._names[first:last] = (name,)

    def gaps(self, start: int, end: int) -> Iterator[tuple[int, int, str]]:
        """What no piece covers between two moments, each with the name of the piece behind it ("" for none)."""
        at = start
        for index in range(bisect_right(self._ends, start), len(self._starts)):
            if self._starts[index] >= end:
                break
            if self._starts[index] > at:
                yield at, self._starts[index], self._names[index]
            at = self._ends[index]
        if at < end:
            behind = bisect_left(self._starts, end)
            yield at, end, self._names[behind] if behind < len(self._names) and self._starts[behind] == end else ""

    def within(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The pieces between two moments, cut at both."""
        for index in range(bisect_right(self._ends, start), len(self._starts)):
            if self._starts[index] >= end:
                return
            yield max(start, self._starts[index]), min(end, self._ends[index])
