"""Numbers over a sliding window: rates of things that happen, and differences of totals that somebody else keeps. Pure;
seconds on any common clock."""

from __future__ import annotations

from collections import deque


class Rate:
    """Amounts per second over the last ``window_s``, or since the beginning while that is shorter."""

    def __init__(self, *, window_s: float) -> None:
        self._window_s = window_s
        self._since: float | None = None
        self._recent: deque[tuple[float, float]] = deque()
        self._recent_sum = 0.0
        """Kept, because a window of a large run holds tens of thousands; exact for counts."""
        self.total = 0.0

    def begin(self, at: float) -> None:
        """Count time from here on, also when nothing comes; only the first call counts."""
        if self._since is None:
            self._since = at

    def add(self, at: float, amount: float) -> None:
        self.begin(at)
        self.total += amount
        self._recent.append((at, amount))
        self._recent_sum += amount
        self._forget(at)

    def per_second(self, now: float) -> float | None:
        """None while there is no second to speak of."""
        if self._since is None or now - self._since < 1.0:
            return None
        self._forget(now)
        return self._recent_sum / min(self._window_s, now - self._since)

    def _forget(self, now: float) -> None:
        while self._recent and self._recent[0][0] < now - self._window_s:
            self._recent_sum -= self._recent.popleft()[1]


class Total:
    """A growing total, read now and then. One that is smaller than before has begun again at 0."""

    def __init__(self, *, window_s: float) -> None:
        self._window_s = window_s
        self._reading = 0.0
        self._seen: deque[tuple[float, float]] = deque()
        self._first: tuple[float, float] | None = None

    def read(self, at: float, total: float) -> None:
        grown = self._seen[-1][1] if self._seen else 0.0
        grown += total - self._reading if total >= self._reading else total
        self._reading = total
        self._seen.append((at, grown))
        self._first = self._first or (at, grown)
        while len(self._seen) > 2 and self._seen[1][0] < at - self._window_s:
            self._seen.popleft()

    def recent_rate(self) -> float | None:
        """Growth per second over the window; None before the second reading."""
        return None if len(self._seen) < 2 else _slope(self._seen[0], self._seen[-1])

    def overall_rate(self) -> float | None:
        """Growth per second since the first reading."""
        return None if self._first is None or len(self._seen) < 2 else _slope(self._first, self._seen[-1])


def _slope(first: tuple[float, float], last: tuple[float, float]) -> float | None:
    seconds = last[0] - first[0]
    return (last[1] - first[1]) / seconds if seconds > 0 else None
