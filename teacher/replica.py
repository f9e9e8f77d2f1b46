"""Which replica takes the next request, when one is out, and how long to wait: decided here, without a clock or a wait.

    suspect ──probe ok──▶ closed ──failure──▶ suspect ──failures in a row──▶ open
    open, rejected ──probe ok──▶ half_open ──answer──▶ closed      half_open ──failure──▶ open
    any ──another model──▶ rejected

*closed* takes requests. *suspect* has failed, or has not been looked at yet, and takes none until a health probe has
seen that it is still the same teacher: a process that died and came back may hold another model. *open* is out after
too many failures in a row. *half_open* takes one trial request. *rejected* answers, but is another teacher. The names
are those of an electrical circuit: current flows while it is closed.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Literal

import msgspec

from engine.errors import TeacherRefused
from teacher.protocol import TeacherInfo

State = Literal["suspect", "closed", "open", "half_open", "rejected"]

Happening = Literal["answered", "failed", "misconfigured", "probe_ok", "probe_failed", "mismatch"]
"""Of a request: an answer (a refusal and an overload are answers), a failure, a misconfiguration.
Of a health probe: healthy, not healthy, healthy but another teacher."""

MISCONFIGURED = frozenset({401, 403, 404, 405, 407})
"""Refusals that speak of the replica and not of the request: wrong token, or something else listens at its address."""

REGROW_S = 30.0
"""A replica that was overloaded may have one more request in flight per this many seconds without another overload."""

_EWMA_SHARE = 0.2
"""Weight of the newest latency: the average forgets half of a change within three answers."""


class Breaker(msgspec.Struct, frozen=True):
    """State of one replica."""

    state: State = "suspect"
    failures: int = 0
    """In a row."""

    def after(self, happening: Happening, *, max_failures: int) -> Breaker:
        """The next state; the same object when nothing changes."""
        if happening == "mismatch":
            return self if self.state == "rejected" else _REJECTED
        match self.state:
            case "closed":
                return self._after_in_closed(happening, max_failures)
            case "suspect":
                return self._after_in_suspect(happening, max_failures)
            case "half_open":
                if happening == "answered":
                    return _CLOSED
                return self if happening == "probe_ok" else _OPEN
            case "open" | "rejected":
                return _HALF_OPEN if happening == "probe_ok" else self

    def _after_in_closed(self, happening: Happening, max_failures: int) -> Breaker:
        match happening:
            case "answered":
                return self if self.failures == 0 else _CLOSED
            case "probe_ok":
                return self
            case "misconfigured":
                return _OPEN
            case _:
                return self._after_failure(max_failures)

    def _after_in_suspect(self, happening: Happening, max_failures: int) -> Breaker:
        match happening:
            case "answered":  # to a request from before: the row of failures ends, the question stays
                return self if self.failures == 0 else _SUSPECT
            case "probe_ok":
                return Breaker("closed", self.failures)
            case "misconfigured":
                return _OPEN
            case _:
                return self._after_failure(max_failures)

    def _after_failure(self, max_failures: int) -> Breaker:
        failures = self.failures + 1
        return _OPEN if failures >= max_failures else Breaker("suspect", failures)


_SUSPECT, _CLOSED, _OPEN = Breaker("suspect"), Breaker("closed"), Breaker("open")
_HALF_OPEN, _REJECTED = Breaker("half_open"), Breaker("rejected")


class Replica:
    """What is known of one replica. Times are seconds of the pool's clock."""

    __slots__ = (
        "_limit",
        "_overloaded_at",
        "breaker",
        "era",
        "failures_total",
        "in_flight",
        "latency_s",
        "max_failures",
        "max_in_flight",
        "name",
        "opened_total",
        "overloads_total",
        "reason",
        "refusal",
        "rest_until",
        "successes_total",
    )

    def __init__(self, name: str, *, max_in_flight: int, max_failures: int) -> None:
        self.name = name
        self.max_in_flight = max_in_flight
        self.max_failures = max_failures
        self.breaker = Breaker()
        self.reason = "not seen yet"
        """Of the present state, in words."""
        self.era = 0
        """Goes up with each re-admission: what a request from an earlier era brings says nothing about this one."""
        self.in_flight = 0
        self.latency_s: float | None = None
        """Exponentially weighted mean of the time to an answer; None before the first."""
        self.rest_until = float("-inf")
        """The replica asked to be left alone until then."""
        self.refusal: TeacherRefused | None = None
        """Set while the replica is out because it refused a request for reasons of its own."""
        self.successes_total = 0
        self.failures_total = 0
        self.overloads_total = 0
        self.opened_total = 0
        self._limit = max_in_flight
        self._overloaded_at = float("-inf")

    @property
    def state(self) -> State:
        return self.breaker.state

    def note(self, happening: Happening, reason: str, *, refusal: TeacherRefused | None = None) -> bool:
        """Take in what happened; True when the state changed."""
        before, self.breaker = self.breaker, self.breaker.after(happening, max_failures=self.max_failures)
        if self.breaker.state == before.state:
            return False
        self.reason = reason
        self.refusal = refusal if self.breaker.state == "open" else None
        if self.breaker.state == "half_open":
            self.era += 1
        elif self.breaker.state == "open":
            self.opened_total += 1
        return True

    def has_room(self, now: float) -> bool:
        """Whether one more request may be sent."""
        state = self.breaker.state
        if state == "closed":
            return self.in_flight < (self.max_in_flight if self._limit == self.max_in_flight else self.limit(now)) and (
                now >= self.rest_until
            )
        return state == "half_open" and self.in_flight == 0 and now >= self.rest_until

    def limit(self, now: float) -> int:
        """Requests that it bears at a time: ``max_in_flight``, or what it bore when it last said that it was too much,
        and one more for each ``REGROW_S`` since. Without this, a replica that bears fewer requests than the recipe
        allows would be overloaded, and left alone, again and again."""
        if self._limit < self.max_in_flight:
            regrown = self._limit + int((now - self._overloaded_at) / REGROW_S)
            if regrown >= self.max_in_flight:
                self._limit = self.max_in_flight
            return min(regrown, self.max_in_flight)
        return self.max_in_flight

    def overloaded(self, now: float, *, rest_s: float) -> None:
        """It answered 429 to a request that is no longer counted in ``in_flight``."""
        self.overloads_total += 1
        self._limit = max(1, min(self.limit(now), self.in_flight))
        self._overloaded_at = now
        self.rest_until = max(self.rest_until, now + rest_s)

    def took(self, seconds: float) -> None:
        """An answer came after ``seconds``."""
        self.latency_s = (
            seconds if self.latency_s is None else self.latency_s + _EWMA_SHARE * (seconds - self.latency_s)
        )

    def took_more_than(self, seconds: float) -> None:
        """No answer for ``seconds``, and nobody waits for it any more."""
        if self.latency_s is not None and seconds > self.latency_s:
            self.took(seconds)

    def __repr__(self) -> str:
        return f"<Replica {self.name} {self.state} ({self.reason}), {self.in_flight} in flight>"


def choose(replicas: Iterable[Replica], now: float) -> Replica | None:
    """The replica for the next request: the one with the fewest in flight, of these the fastest, then by name. One
    without a latency counts as fastest, so that each is tried. None: no room anywhere."""
    best: Replica | None = None
    for replica in replicas:
        if replica.has_room(now) and (best is None or _order(replica) < _order(best)):
            best = replica
    return best


def _order(replica: Replica) -> tuple[int, float, str]:
    return (replica.in_flight, replica.latency_s or 0.0, replica.name)


def backoff_s(attempt: int, *, first_s: float, max_s: float, rng: random.Random) -> float:
    """Wait before attempt number ``attempt + 1``: uniform in [0, min(max_s, first_s · 2^(attempt−1))].

    The whole interval is random (full jitter): requests that failed together must not come back together.
    """
    # 2^64 · first_s is beyond every max_s; larger powers would overflow.
    return rng.uniform(0.0, min(max_s, first_s * 2.0 ** min(attempt - 1, 64)))


def difference(known: TeacherInfo, found: TeacherInfo) -> str | None:
    """Why ``found`` cannot stand in for ``known``, in words; None when it can.

    Token ids and weights must be the same, whatever the folders are called; limits may be wider but not narrower,
    because requests that were fine at one replica would be refused by the other.
    """
    for field in ("vocab_size", "tokenizer_size", "tokenizer_fingerprint", "weights_fingerprint", "protocol"):
        ours, theirs = getattr(known, field), getattr(found, field)
        if ours != theirs:
            return f"{field} is {theirs!r}, the other replicas have {ours!r}"
    for field in ("max_length", "max_top_k"):
        ours, theirs = getattr(known, field), getattr(found, field)
        if theirs < ours:
            return f"{field} is {theirs}, less than the {ours} of the other replicas"
    return None
