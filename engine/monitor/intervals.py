"""How long something was busy, when its pieces of work overlap. Pure; seconds on any common clock."""

from __future__ import annotations

from collections import deque

_MAX_PIECES = 512
"""Disjoint pieces kept apart; the older half of more than that becomes one block."""
_MAX_BLOCKS = 256
"""A block is 256 pieces: together they reach back half a minute even with a thousand pieces a second. What is older
lives on in the sum alone."""


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
        self._blocks: deque[tuple[float, float, float]] = deque(maxlen=_MAX_BLOCKS)
        """Start, end and busy seconds between them."""
        self._blocks_s = 0.0
        self._blocks_until = float("-inf")

    @property
    def total_s(self) -> float:
        """Busy seconds since the beginning."""
        return self._blocks_s + sum(end - start for start, end in self._pieces)

    def add(self, start: float, end: float) -> None:
        """Busy from ``start`` to ``end``. One that ends before an earlier one counts where nothing else does."""
        start = max(start, self._blocks_until)
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
        if len(self._pieces) > _MAX_PIECES:
            self._block(_MAX_PIECES // 2)

    def within(self, start: float, end: float) -> float:
        """Busy seconds between two moments. Long ago exact only to the block; before the oldest block, 0."""
        found = 0.0
        for piece_start, piece_end in reversed(self._pieces):
            if piece_end <= start:
                return found
            found += max(0.0, min(piece_end, end) - max(piece_start, start))
        for block_start, block_end, busy in reversed(self._blocks):
            if block_end <= start:
                break
            overlap = max(0.0, min(block_end, end) - max(block_start, start))
            found += busy * overlap / (block_end - block_start)
        return found

    def _block(self, count: int) -> None:
        old, self._pieces = self._pieces[:count], self._pieces[count:]
        busy = sum(end - start for start, end in old)
        self._blocks.append((old[0][0], old[-1][1], busy))
        self._blocks_s += busy
        self._blocks_until = old[-1][1]
