"""Where on one common time line the moments of one process lie. Lines carry two clocks: ``t``, the wall clock, which
people set; and ``start_ns`` of spans, the monotonic clock, which begins anew with the machine. All times here are
microseconds; the common line is the wall clock as it stood when the process opened its log."""

from __future__ import annotations

_MAX_LATENESS_US = 1_000_000
"""Between the end of a span and the ``t`` of its line lie microseconds, more when threads fight for the interpreter. A
difference that changes by more than this means that one of the two clocks was set."""
_ANOTHER_US = 10_000_000
"""A monotonic clock that went back by this much is another machine's, or the same after its start. By less, it may be a
line that its thread wrote very late."""


class ProcessClock:
    """Spans are placed by the monotonic clock, so that what followed each other never overlaps; facts by ``t``, less
    what the wall clock was moved by since the log was opened."""

    def __init__(self) -> None:
        self._offset_us: int | None = None
        """Common time minus monotonic time."""
        self._moved_us = 0
        """By which the wall clock is ahead of the common time."""
        self._last: tuple[int, int] | None = None
        """Wall and monotonic time of the last span's end."""

    def opened(self, at_us: int, start_ns: int | None) -> None:
        """A process begins (``log.opened``): whatever was known of the clocks belongs to an earlier one."""
        self._offset_us = None if start_ns is None else at_us - start_ns // 1000
        self._moved_us = 0
        self._last = None if start_ns is None else (at_us, start_ns // 1000)

    def span(self, at_us: int, start_ns: int, dur_us: int) -> tuple[int, int]:
        """Start and end of a span whose line was written at ``at_us``."""
        end_us = start_ns // 1000 + dur_us
        ahead_us = at_us - end_us
        if self._offset_us is None:
            self._offset_us = ahead_us
        elif abs(ahead_us - self._offset_us - self._moved_us) > _MAX_LATENESS_US:
            self._reconcile(at_us, end_us, ahead_us)
        self._last = (at_us, end_us)
        end = end_us + self._offset_us
        return end - dur_us, end

    def fact(self, at_us: int) -> int:
        """When a line was written that is no span."""
        return at_us - self._moved_us

    def _reconcile(self, at_us: int, end_us: int, ahead_us: int) -> None:
        """One of the clocks jumped since the last span: the monotonic one if it went back, else the one that moved
        further."""
        assert self._offset_us is not None
        wall_us, monotonic_us = self._last or (at_us, end_us)
        if end_us < monotonic_us - _ANOTHER_US or end_us - monotonic_us > abs(at_us - wall_us):
            # Another process, whose ``log.opened`` is lost.
            self._offset_us, self._moved_us = ahead_us, 0
        else:
            self._moved_us = ahead_us - self._offset_us
