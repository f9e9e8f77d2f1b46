"""Carries points to one sink without the run ever waiting for it. Decides what happens when the sink is slow, fails, or
does not come to an end; knows no particular sink."""

from __future__ import annotations

import threading
from collections import deque
from typing import Protocol

from engine.monitor.sinks.points import Point, Points
from engine.tracing import Event, log


class Sink(Protocol):
    """Where points go. All methods are called in one thread, in this order; each may raise and may take its time."""

    @property
    def name(self) -> str: ...

    def open(self) -> str:
        """Begin; returns where people find it."""
        ...

    def write(self, point: Point) -> None: ...

    def flush(self) -> None:
        """Whatever was written can be seen by others when this returns. Called when nothing more waits."""
        ...

    def close(self, *, ok: bool) -> None:
        """``ok``: the run came to its end without failing."""
        ...


class Feed:
    """Consumes: lines of the log (``tracing.subscribe(name, feed.apply)``), from any thread
        waits for:     nothing: a line that finds the queue full takes the place of the oldest point
    Produces: calls of the sink, in a thread of its own
        waits for:     a point, or ``end``
        unblocked by:  ``apply`` and ``end``

    A sink that raises is called no more and ``sink.failed`` says so once; points that were left out are counted and
    said with ``sink.dropped``.

    Args:
        max_points: how many may wait. Of a queue that is full the oldest is left out: how a run ends says more than its
            middle.
    """

    def __init__(self, sink: Sink, *, max_points: int) -> None:
        self.name = sink.name
        self._sink = sink
        self._points = Points()
        self._waiting: deque[Point] = deque()
        self._max_points = max_points
        self._num_dropped = 0
        """Since it was last said."""
        self._changed = threading.Condition()
        self._is_over = False
        """The sink is called no more, or nobody waits for it any longer."""
        self._ends_ok: bool | None = None
        """None: goes on."""
        # A daemon: a sink that hangs must not keep the process.
        self._thread = threading.Thread(target=self._run, name=f"sink {sink.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def apply(self, event: Event) -> None:
        """Take in one line of the log."""
        point = self._points.point(event)
        if point is None:
            return
        with self._changed:
            if self._is_over:
                return
            if len(self._waiting) == self._max_points:
                self._waiting.popleft()
                self._num_dropped += 1
            self._waiting.append(point)
            self._changed.notify()

    def end(self, *, ok: bool) -> None:
        """Nothing more comes: write what waits and close. Returns at once."""
        with self._changed:
            self._ends_ok = ok
            self._changed.notify()

    def join(self, timeout_s: float) -> None:
        """Wait until ``end`` is carried out; after ``timeout_s`` what is left is given up."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            left = len(self._waiting)
            self._fail(
                f"did not end within {timeout_s:.0f} s of the run's end; {left} points and what it holds are lost"
            )
        self._say_dropped()

    def _run(self) -> None:
        try:
            where = self._sink.open()
            if self._is_over:
                return
            log.info("sink.opened", sink=self.name, where=where)
            while points := self._take():
                for point in points:
                    if self._is_over:
                        return
                    self._sink.write(point)
                self._sink.flush()
                self._say_dropped()
            if not self._is_over:
                self._sink.close(ok=bool(self._ends_ok))
        except (Exception, SystemExit) as error:  # whatever a library of others does, the run goes on
            self._fail(f"{type(error).__name__}: {error}", error)

    def _take(self) -> list[Point]:
        """All that wait, at least one; empty when no more will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ends_ok is not None or self._is_over)
            points = list(self._waiting)
            self._waiting.clear()
        return points

    def _say_dropped(self) -> None:
        with self._changed:
            num_dropped, self._num_dropped = self._num_dropped, 0
        if num_dropped:
            log.warning("sink.dropped", sink=self.name, num_dropped=num_dropped)

    def _fail(self, why: str, error: BaseException | None = None) -> None:
        with self._changed:
            if self._is_over:
                return
            self._is_over = True
            self._waiting.clear()
        log.warning("sink.failed", sink=self.name, error=why, exc_info=error)
