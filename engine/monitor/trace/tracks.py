"""The tracks of a trace: a process per log and node, in it a track per actor, wide enough for what it does at a time.
Decides names, numbers and their order; what is drawn on them is decided in ``convert``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from engine.monitor.trace.chrome import TraceEvent, process_name, thread_name
from engine.monitor.trace.clocks import ProcessClock
from engine.monitor.trace.journeys import Slice
from engine.monitor.trace.lanes import Lanes
from engine.monitor.trace.pieces import Pieces
from engine.monitor.trace.waits import ChannelWaits
from engine.monitor.view import STANDARD_GRAPH

NODE, VERSIONS, EVENTS, AWAY = "node", "weight versions", "events", "teacher away"
"""Tracks that belong to no actor."""

# Viewers that know no ``thread_sort_index`` (Perfetto's until 2025) order the threads of a process by their number. So
# every track has a block of numbers, in the order in which tracks are to stand. All numbers differ, over all processes:
# Perfetto finds the name of a thread by its number alone.
_LANES = 1_000
"""Threads in the block of one track; its waits have the last one."""
_TRACKS = 100
"""Blocks of one process."""
FIRST_SPARE_TID = 1 << 31
"""For lanes, tracks and processes that are too many for this order."""
_OWN_PLACES = {VERSIONS: 0, NODE: 1, AWAY: 98, EVENTS: 99}
_GRAPH_PLACES = range(2, 50)
_OTHER_PLACES = range(50, 98)


class Track:
    """One actor: lanes of slices, and when it ran.

    Overlapping spans go to lanes, which are threads to a viewer ("sampler 1", "sampler 2", …), and not into async
    events. Lanes look like the decode slots and the places at the teacher that they stand for, so an empty one is seen
    at once; and arrows bind to slices of threads only.
    """

    def __init__(self, name: str, *, block: range, spare_tid: Callable[[], int]) -> None:
        """``block``: numbers of its threads, perhaps none; ``spare_tid`` gives others."""
        self.name = name
        self.tids: list[int] = []
        """Of the lanes, in the order in which they were needed first."""
        self.waits_tid: int | None = None
        self.busy = Pieces()
        self.periods = Pieces()
        """When it ran."""
        self.wave: Slice | None = None
        """Its last wave of a deterministic run."""
        self._running_since: int | None = None
        self._lanes = Lanes()
        self._lane_busy_us: list[int] = []
        self._block = block
        self._spare_tid = spare_tid

    def tid(self, start_us: int, end_us: int) -> int:
        """Of the lane where this interval overlaps nothing."""
        lane = self._lanes.place(start_us, end_us)
        if lane == len(self.tids):
            self.tids.append(self._new_tid())
            self._lane_busy_us.append(0)
        self._lane_busy_us[lane] += end_us - start_us
        return self.tids[lane]

    def lanes(self) -> list[int]:
        """Threads of the lanes, the busiest first: those that only the greatest rush needed stand below."""
        pairs = zip(self._lane_busy_us, self.tids, strict=False)
        return [tid for _, tid in sorted(pairs, key=lambda pair: -pair[0])] or self.tids

    def only_tid(self) -> int:
        """Of a track of instants, which may lie one over another."""
        if not self.tids:
            self.tids.append(self._new_tid())
        return self.tids[0]

    def wait_tid(self) -> int:
        if self.waits_tid is None:
            self.waits_tid = self._block[-1] if self._block else self._spare_tid()
        return self.waits_tid

    def _new_tid(self) -> int:
        lane = len(self.tids)
        return self._block[lane] if lane < len(self._block) - 1 else self._spare_tid()

    def enter(self, state: str, at_us: int) -> None:
        """It changed its state (``actor.state_changed``)."""
        if state in ("running", "draining"):
            if self._running_since is None:
                self._running_since = at_us
        elif self._running_since is not None:
            self._add_period(self._running_since, at_us)

    def cut(self, at_us: int) -> None:
        """Its process was killed, or is still running: nothing comes after ``at_us``. What was under way then is in no
        line, so of an actor that logs spans nothing is known after the last of them."""
        if self._running_since is not None:
            self._add_period(self._running_since, self.busy.end if len(self.busy) else at_us)

    def _add_period(self, start_us: int, end_us: int) -> None:
        self._running_since = None
        if end_us > start_us:
            self.periods.add(start_us, end_us)


class Process:
    """One log's lines of one node."""

    def __init__(self, pid: int, name: str, *, spare_tid: Callable[[], int]) -> None:
        self.pid = pid
        self.name = name
        self.clock = ProcessClock()
        self.graph: dict[str, tuple[str | None, str | None]] = {
            actor: (consumes, produces) for actor, consumes, produces in STANDARD_GRAPH
        }
        """Channels that each actor consumes and produces, in the order of the flow."""
        self.channels: dict[str, ChannelWaits] = {}
        self.readings: dict[str, object] = {}
        """What counters show now."""
        self.generated: tuple[int, float] | None = None
        """When the generator was last asked, and how many tokens it had made."""
        self.last_us = 0
        self._tracks: dict[str, Track] = {}
        self._own_tracks: dict[str, Track] = {}
        self._free_places = {*_GRAPH_PLACES, *_OTHER_PLACES}
        self._spare_tid = spare_tid

    def track(self, actor: str) -> Track:
        track = self._tracks.get(actor)
        if track is None:
            track = self._tracks[actor] = self._new_track(actor, self._take_place(actor))
        return track

    def own_track(self, name: str) -> Track:
        """NODE, VERSIONS, EVENTS or AWAY; an actor may bear the same name."""
        track = self._own_tracks.get(name)
        if track is None:
            track = self._own_tracks[name] = self._new_track(name, _OWN_PLACES[name])
        return track

    def _take_place(self, actor: str) -> int | None:
        wanted = [place for place, name in zip(_GRAPH_PLACES, self.graph, strict=False) if name == actor]
        for place in itertools.chain(wanted, _OTHER_PLACES):
            if place in self._free_places:
                self._free_places.remove(place)
                return place
        return None

    def _new_track(self, name: str, place: int | None) -> Track:
        first = (self.pid * _TRACKS + (place or 0)) * _LANES
        has_block = place is not None and first + _LANES <= FIRST_SPARE_TID
        block = range(first, first + _LANES) if has_block else range(0)
        return Track(name, block=block, spare_tid=self._spare_tid)

    def restart(self) -> None:
        """What follows was written by another process of this node, or nothing follows."""
        for track in self._tracks.values():
            track.cut(self.last_us)
        for channel in self.channels.values():
            channel.restart()
        self.generated = None

    def actors(self) -> Iterator[tuple[Track, ChannelWaits | None, ChannelWaits | None]]:
        """Every actor that ran or did something, with the channels before and behind it."""
        for name in [*self.graph, *(name for name in self._tracks if name not in self.graph)]:
            consumes, produces = self.graph.get(name, (None, None))
            if name in self._tracks:
                yield self._tracks[name], self.channels.get(consumes or ""), self.channels.get(produces or "")

    def names(self, *, order: int) -> Iterator[TraceEvent]:
        """Metadata of the process and its tracks: versions on top, actors in the order of the flow, then facts."""
        yield from process_name(self.pid, self.name, order=order)
        own = self._own_tracks
        actors = [track for track, _, _ in self.actors()]
        place = 0
        for track in (own.get(VERSIONS), own.get(NODE), *actors, own.get(AWAY), own.get(EVENTS)):
            if track is None:
                continue
            name = track.name
            for lane, tid in enumerate(track.lanes(), start=1):
                title = name if len(track.tids) == 1 else f"{name} {lane}"
                yield from thread_name(self.pid, tid, title, order=(place := place + 1))
            if track.waits_tid is not None:
                yield from thread_name(self.pid, track.waits_tid, f"{name} waits", order=(place := place + 1))
