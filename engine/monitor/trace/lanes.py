"""On which of several parallel tracks an interval is drawn, so that none overlap. Pure."""

from __future__ import annotations

from bisect import bisect_right, insort


class Lanes:
    """As few lanes as hold all intervals side by side, as long as these come in the order of their ends (as spans are
    logged); any other order costs lanes, never an overlap.

    The lane is taken that fell free last. So an answer that takes over a decode slot is drawn behind the one that left
    it, and a gap in a lane is a slot that stood empty.

    Example::

        lanes = Lanes()
        assert lanes.place(0, 10) == 0
        assert lanes.place(5, 12) == 1      # overlaps the first
        assert lanes.place(11, 20) == 0     # the second is still there
        assert lanes.place(15, 30) == 1
    """

    def __init__(self) -> None:
        self._free: list[tuple[int, int]] = []
        """End of the last interval and minus the number of each lane, ascending: of equal ends the first lane is
        taken."""

    def place(self, start: int, end: int) -> int:
        """Number of the lane, counted from 0."""
        index = bisect_right(self._free, (start, 0)) - 1
        lane = -self._free.pop(index)[1] if index >= 0 else len(self._free)
        insort(self._free, (end, -lane))
        return lane
