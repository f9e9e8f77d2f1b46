"""Which slices of a trace one rollout went through: sampled, scored, trained. Pure.

A rollout that a killed process held is sampled again by the next one, under the same number: that is another journey.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

SAMPLED, SCORED, TRAINED = range(3)

_MAX_UNDER_WAY = 200_000
"""Far more than a run has slots. A log in which nothing is ever trained (of a node that only samples) would fill the
memory otherwise; what is oldest ends its journey."""


class Slice(NamedTuple):
    """A place in the trace that an arrow begins or ends at."""

    pid: int
    tid: int
    start_us: int
    end_us: int


Journey = tuple[Slice, ...]
"""At least two slices, by their start."""


class Journeys:
    """Collects the stages of every rollout; they may come in any order, since nodes have clocks of their own."""

    def __init__(self) -> None:
        self._under_way: dict[int, list[Slice | None]] = {}

    def reach(self, rollout_id: int, stage: int, place: Slice) -> Journey | None:
        """A rollout was in ``place``; returns the journey that this one completes, or that it shows to have ended."""
        ended: Journey | None = None
        stages = self._under_way.get(rollout_id)
        if stages is not None and stages[stage] is not None:
            ended, stages = _journey(self._under_way.pop(rollout_id)), None
        if stages is None:
            stages = self._under_way[rollout_id] = [None, None, None]
            if len(self._under_way) > _MAX_UNDER_WAY:
                ended = _journey(self._under_way.pop(next(iter(self._under_way)))) or ended
        stages[stage] = place
        if None not in stages:
            ended = _journey(self._under_way.pop(rollout_id))
        return ended

    def rest(self) -> Iterator[Journey]:
        """Those that never reached their end: of a live or a killed run, and those that were not sampled but given."""
        for stages in self._under_way.values():
            journey = _journey(stages)
            if journey is not None:
                yield journey
        self._under_way.clear()


def _journey(stages: list[Slice | None]) -> Journey | None:
    places = sorted((place for place in stages if place is not None), key=lambda place: place.start_us)
    return tuple(places) if len(places) > 1 else None
