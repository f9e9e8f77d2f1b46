"""What readers of the status page are sent and when: lines of the log go in, in any thread; JSON comes out, in one.

A reader is told everything at first and then what has changed since it last asked. One that asks seldom misses what
lies between and nothing else: there is no queue behind it. Knows no HTTP and waits for nothing.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec

from engine.monitor.snapshot import SECTIONS, Part
from engine.monitor.view import RunView
from engine.step_log import plain
from engine.tracing import Event, log

MAX_LINES_A_TURN = 250
"""2 ms of work, measured: what stands still meanwhile is the loop that all actors share."""


class Feed:
    """Made for one loop: ``put`` may be called in any thread, everything else in that of the loop."""

    def __init__(self) -> None:
        self.view = RunView()
        self._waiting: deque[Event] = deque()
        self._is_stale = True
        self._number = 0
        """Of the last change."""
        self._sections: dict[str, tuple[int, bytes]] = {}
        """Number of the change that made each, and its JSON."""
        self._left_out: set[str] = set()
        self._encoder = msgspec.json.Encoder(enc_hook=plain)

    def put(self, event: Event) -> None:
        """Takes note, and leaves the work to ``take_in``."""
        self._waiting.append(event)

    def take_in(self) -> bool:
        """Look at what was put, ``MAX_LINES_A_TURN`` at most; True: there is more."""
        for _ in range(min(len(self._waiting), MAX_LINES_A_TURN)):
            self._is_stale = True
            try:
                self.view.apply(self._waiting.popleft())
            except (KeyError, TypeError, ValueError, AttributeError):
                # An actor of somebody else's may use a name of ours with other fields. The terminal, which reads the
                # same lines, has said so (``monitor.line_ignored``).
                continue
        return bool(self._waiting)

    def reader(self) -> Reader:
        return Reader(self)

    def news(self, seen: int) -> tuple[int, bytes]:
        """The number of the last change, and one JSON object with every section that has changed since ``seen`` (0:
        all); empty when none has."""
        self._renew()
        changed = [
            b'"' + name.encode() + b'":' + text for name, (number, text) in self._sections.items() if number > seen
        ]
        return self._number, b"{" + b",".join(changed) + b"}" if changed else b""

    def _renew(self) -> None:
        if not self._is_stale:
            return
        self._is_stale = False
        number = self._number + 1
        for name, make in SECTIONS.items():
            try:
                text = self._encode(make(self.view))
            except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
                # What somebody else's line left in the view must not take the other sections away.
                self._leave_out(name, error)
                continue
            if name not in self._sections or self._sections[name][1] != text:
                self._sections[name] = (number, text)
                self._number = number

    def _leave_out(self, section: str, error: Exception) -> None:
        if section not in self._left_out:
            self._left_out.add(section)
            log.warning("monitor.section_left_out", section=section, error=repr(error))

    def _encode(self, part: Part) -> bytes:
        try:
            return self._encoder.encode(part)
        except (UnicodeError, TypeError, ValueError, OverflowError):
            # A name or an answer that JSON cannot hold (half a surrogate pair, say) must not take the page away.
            return self._encoder.encode(_without_surrogates(msgspec.to_builtins(part, enc_hook=plain)))


class Reader:
    """One page."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._seen = 0

    def news(self) -> bytes:
        """What has changed since the last call, as one JSON object without newlines; empty when nothing has."""
        self._seen, text = self._feed.news(self._seen)
        return text


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_surrogates(each) for each in value]
    return value
