"""When an actor could not work, and for want of what. Pure; microseconds.

The log tells it in two ways. An actor's spans say when it had work under way, to the microsecond: between them it had
none. And once a second every channel says how long calls have waited in it, for an item or for room: how much of the
second is exact, where within the second is not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from engine.monitor.trace.pieces import Pieces

NO_INPUT, NO_ROOM, NOT_LIVE = "no input", "no room", "version not live"

_WAITS_BEFORE = {"learner.step": NOT_LIVE, "eval.run": NOT_LIVE}
"""What the time in front of a span was spent on, where it is not waiting for input: the optimizer, and a measurement,
wait until the generator holds the version before."""

_MIN_WAIT_US = 1_000
"""Shorter ones are the loop's own work between two spans."""
_WHOLE = 0.98
"""A call that waits all the time is counted a little short of the interval, which ends late when the loop is busy."""


class Wait(NamedTuple):
    reason: str
    start_us: int
    end_us: int


class ChannelWaits:
    """The waits in one channel, made from its readings."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.no_room = Pieces()
        """A sender waited."""
        self.no_input = Pieces()
        """A receiver waited."""
        self.known = Pieces()
        """Between two readings of one process."""
        self._last: tuple[int, float, float] | None = None

    def restart(self) -> None:
        """The next reading is another process's: its sums begin anew."""
        self._last = None

    def read(self, at_us: int, *, is_full: bool, is_empty: bool, send_wait_s: float, receive_wait_s: float) -> None:
        """Take in one reading: the state of the moment, and sums since the process began."""
        if self._last is not None and at_us > self._last[0]:
            before_us, sent_s, received_s = self._last
            self.known.add(before_us, at_us)
            for pieces, waited_s, at_end in (
                (self.no_room, send_wait_s - sent_s, is_full),
                (self.no_input, receive_wait_s - received_s, is_empty),
            ):
                placed = place(before_us, at_us, waited_s=waited_s, at_end=at_end)
                if placed is not None:
                    pieces.add(*placed)
        self._last = (at_us, send_wait_s, receive_wait_s)


def place(start_us: int, end_us: int, *, waited_s: float, at_end: bool) -> tuple[int, int] | None:
    """Where to draw ``waited_s`` of an interval: at its end if somebody still waits there, else at its beginning. Calls
    that waited side by side are summed, so there may be more than the interval is long."""
    waited_us = min(waited_s * 1e6, end_us - start_us)
    if waited_us < _MIN_WAIT_US:
        return None
    if waited_us >= _WHOLE * (end_us - start_us):
        return start_us, end_us
    return (end_us - int(waited_us), end_us) if at_end else (start_us, start_us + int(waited_us))


def waits(
    periods: Iterable[tuple[int, int]], *, busy: Pieces, source: ChannelWaits | None, output: ChannelWaits | None
) -> Iterator[Wait]:
    """The waits of one actor, none of which overlap.

    Args:
        periods: when it was running; disjoint.
        busy: its spans. An actor that logs none is taken to work whenever no channel says that it waits; one that
            consumes nothing either, to wait whenever it has room.
        source: the channel that it receives from.
        output: the channel that it sends to.
    """
    for start, end in periods:
        full = Pieces()
        for piece in () if output is None else output.no_room.within(start, end):
            full.add(*piece)
            yield Wait(NO_ROOM, *piece)
        for idle_start, idle_end, behind in _idle(start, end, busy, source, output):
            for piece_start, piece_end, _ in full.gaps(idle_start, idle_end):
                if piece_end - piece_start >= _MIN_WAIT_US:
                    yield Wait(_WAITS_BEFORE.get(behind, NO_INPUT), piece_start, piece_end)


def _idle(
    start: int, end: int, busy: Pieces, source: ChannelWaits | None, output: ChannelWaits | None
) -> Iterator[tuple[int, int, str]]:
    if len(busy):
        yield from busy.gaps(start, end)
    elif source is not None:
        yield from ((*piece, "") for piece in source.no_input.within(start, end))
    elif output is not None:
        yield from ((*piece, "") for piece in output.known.within(start, end))
