"""A lock that threads get in the order in which they asked."""

from __future__ import annotations

import threading
from collections import deque


class Turn:
    """As ``threading.Lock`` in a ``with``, but whoever returns at once does not overtake who waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()

    def __enter__(self) -> None:
        mine = threading.Event()
        with self._lock:
            self._waiting.append(mine)
            if len(self._waiting) == 1:
                mine.set()
        mine.wait()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._waiting.popleft()
            if self._waiting:
                self._waiting[0].set()
