"""A run as its terminal shows it: a live picture when there is a terminal, plain lines when there is none.

Fed by the log alone. The lines come in whatever thread writes them and are only put aside there; one thread of its own
takes them in, draws and prints, so that a terminal that stands still (Ctrl-S, a slow line) never holds up the run.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from datetime import datetime
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from engine.monitor.picture import Picture
from engine.monitor.sentences import step_line
from engine.monitor.summary import Summary, print_summary
from engine.monitor.view import Notice, RunView
from engine.tracing import Event, Tracing, log

_REFRESH_S = 0.5
_JOIN_S = 5.0
"""A terminal that takes nothing for this long at the end is left to itself."""


class RunConsole(Console):
    """A console whose reader may leave: rich would end the process with code 1 and point stdout elsewhere; a run goes
    on without it."""

    def on_broken_pipe(self) -> None:
        """Called while the error is handled: lets it go on.

        Raises:
            BrokenPipeError: always.
        """
        raise


class Terminal:
    """Shows the run between ``with`` and its end.

    Args:
        live: draw a picture and keep it up to date; otherwise one line per step and per notable event.
        console: where to; None: stderr. The summary goes to stdout.

    ``view`` is what it knows of the run; complete after the ``with`` block.
    """

    def __init__(self, tracing: Tracing, *, live: bool, console: Console | None = None) -> None:
        self.view = RunView()
        self._console = console or RunConsole(stderr=True)
        self._waiting: deque[Event] = deque()
        self._ends = threading.Event()
        self._not_understood: set[str] = set()
        self._live = Live(console=self._console, auto_refresh=False, transient=True) if live else None
        # A daemon: a terminal that takes nothing must not keep the process from ending.
        self._thread = threading.Thread(target=self._watch, name="terminal", daemon=True)
        self._tracing = tracing

    def __enter__(self) -> Self:
        self._subscription = self._tracing.subscribe("terminal", self._waiting.append)
        if self._live is not None:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._subscription.cancel()
        self._ends.set()
        self._thread.join(_JOIN_S)
        if self._live is not None:
            # What was last seen of a run that failed stays on the screen.
            self._live.transient = kind is None
            self._live.stop()

    def show(self, summary: Summary) -> None:
        """Print the end of the run to stdout; when nobody reads it (``| head``), that is logged and no failure."""
        try:
            print_summary(summary, RunConsole())
        except BrokenPipeError as error:
            log.warning("summary.not_shown", error=repr(error))
            # What is left in the buffer would fail once more when the interpreter ends, with exit code 120.
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())

    def _watch(self) -> None:
        """Take in what has been put aside, twice a second, and once more at the end.

        Waits for: the next turn. Unblocked by: time, or the end.
        """
        try:
            while not self._ends.wait(_REFRESH_S):
                self._turn()
            self._turn()
        except Exception as error:
            self._subscription.cancel()
            self._waiting.clear()
            log.error("monitor.ended", error=repr(error), exc_info=error)

    def _turn(self) -> None:
        while self._waiting:
            self._take(self._waiting.popleft())
        if self._live is not None:
            self._live.update(
                Picture(self.view, now=time.time(), height=max(4, self._console.height - 1)), refresh=True
            )

    def _take(self, event: Event) -> None:
        try:
            notice = self.view.apply(event)
        except (KeyError, TypeError, ValueError) as error:
            # An actor of somebody else's may use a name of ours with other fields: nothing to end the picture for.
            if event["event"] not in self._not_understood:
                self._not_understood.add(event["event"])
                log.warning("monitor.line_ignored", line=event["event"], error=repr(error))
            return
        if self._live is None:
            self._print(event, notice)

    def _print(self, event: Event, notice: Notice | None) -> None:
        if event["event"] == "learner.step" and event["outcome"] == "ok":
            self._say(event, step_line(event, steps=self.view.steps, interval_s=self.view.step_interval_s))
        if notice is not None:
            self._say(event, notice.text if notice.level == "info" else f"{notice.level.upper()} {notice.text}")

    def _say(self, event: Event, text: str) -> None:
        at = datetime.fromisoformat(event["t"]).astimezone()
        self._console.print(Text(f"{at:%H:%M:%S} {text}"), soft_wrap=True, highlight=False)
