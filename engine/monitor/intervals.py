"""How long something was busy, when its pieces of work overlap. Pure; seconds on any common clock."""

from __future__ import annotations

_MAX_KEPT = 512
"""Disjoint pieces remembered one by one; older ones live on in the sum. A window of half a minute needs far fewer."""


class BusyTime:
    """The union of intervals, given in the order of their ends (as spans are logged).

    Example::

        busy = BusyTime()
        busy.add(0.0, 2.0)
        busy.add(1.0, 3.0)      # overlaps: seconds are not counted twice
        busy.add(5.0, 6.0)
        assert busy.within(0.0, 10.0) == 4.0
        assert busy.within(2.0, 5.5) == 1.5
    """

    def __init__(self) -> None:
        self._pieces: list[tuple[float, float]] = []
        self._forgotten_s = 0.0
        self._forgotten_until = float("-inf")

    @property
    def total_s(self) -> float:
        """Busy seconds since the beginning."""
        return self._forgotten_s + sum(end - start for start, end in self._pieces)

    def add(self, start: float, end: float) -> None:
        """Busy from ``start`` to ``end``. One that ends before an earlier one counts where nothing else does."""
        start = max(start, self._forgotten_until)
        after = []
        while self._pieces and self._pieces[-1][1] >= start:
            piece = self._pieces.pop()
            if piece[0] > end:
                after.append(piece)
            else:
                start, end = min(start, piece[0]), max(end, piece[1])
        if end > start:
            self._pieces.append((start, end))
        self._pieces += reversed(after)
        if len(self._pieces) > _MAX_KEPT:
            self._forget(_MAX_KEPT // 2)

    def within(self, start: float, end: float) -> float:
        """Busy seconds between two moments; of a time long past only what is still remembered."""
        found = 0.0
        for piece_start, piece_end in reversed(self._pieces):
            if piece_end <= start:
                break
            found += max(0.0, min(piece_end, end) - max(piece_start, start))
        return found

    def _forget(self, count: int) -> None:
        old, self._pieces = self._pieces[:count], self._pieces[count:]
        self._forgotten_s += sum(end - start for start, end in old)
        self._forgotten_until = old[-1][1]
