"""Judges a trace by the Chrome trace event format, and reads what it shows."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

_KEYS = {
    "X": {"name", "cat", "ts", "dur", "pid", "tid", "args"},
    "i": {"name", "cat", "ts", "pid", "tid", "s", "args"},
    "C": {"name", "ts", "pid", "args"},
    "M": {"name", "pid", "args"},
    "s": {"name", "cat", "ts", "pid", "tid", "id"},
    "t": {"name", "cat", "ts", "pid", "tid", "id"},
    "f": {"name", "cat", "ts", "pid", "tid", "id", "bp"},
}
_METADATA = {
    "process_name": ("name", str),
    "thread_name": ("name", str),
    "process_sort_index": ("sort_index", int),
    "thread_sort_index": ("sort_index", int),
}

Event = dict[str, Any]


class Trace:
    """A trace that keeps the format's rules; raises AssertionError when it does not.

    Every phase has its keys; times and durations are whole microseconds, none negative, few enough that floating point
    holds them as nanoseconds; all numbers are finite; slices of one thread do not overlap; every thread and process has
    one name, and no thread belongs to two processes; every arrow starts and ends once, in the order of time, each time
    within a slice of its thread; counters have numbers.
    """

    def __init__(self, text: bytes) -> None:
        self.json: Any = json.loads(text, parse_constant=_refuse)
        assert list(self.json) == ["displayTimeUnit", "traceEvents", "otherData"]
        self.zero = datetime.fromisoformat(self.json["otherData"]["time zero"])
        assert self.json["displayTimeUnit"] in ("ms", "ns")
        self.events: list[Event] = self.json["traceEvents"]
        for event in self.events:
            _check(event)
        self.slices = self.of("X")
        self.processes = self._names("process_name", "pid")
        self.threads = self._names("thread_name", "tid")
        drawn = {(e["pid"], e["tid"]) for e in self.events if e["ph"] in "Xistf"}
        assert {tid for _, tid in drawn} == set(self.threads)
        assert len(drawn) == len(self.threads)
        assert {e["pid"] for e in self.events} == set(self.processes)
        self._by_thread: dict[int, list[Event]] = defaultdict(list)
        for piece in sorted(self.slices, key=lambda e: (e["ts"], e["dur"])):
            self._by_thread[piece["tid"]].append(piece)
        for pieces in self._by_thread.values():
            for before, after in itertools.pairwise(pieces):
                assert before["ts"] + before["dur"] <= after["ts"], f"{before} overlaps {after}"
        self.arrows = self._arrows()

    @classmethod
    def read(cls, path: Path) -> Trace:
        return cls(path.read_bytes())

    def of(self, *phases: str) -> list[Event]:
        return [event for event in self.events if event["ph"] in phases]

    def named(self, name: str, phase: str = "X") -> list[Event]:
        return [event for event in self.of(phase) if event["name"] == name]

    def on(self, track: str) -> list[Event]:
        """Slices and instants of the tracks of this name, by time; of all lanes when there are several."""
        tids = {tid for tid, name in self.threads.items() if name == track or _lane_of(name, track)}
        return sorted((e for e in self.of("X", "i") if e["tid"] in tids), key=lambda e: (e["ts"], e["tid"]))

    def lanes(self, track: str) -> list[str]:
        return [name for name in self.threads.values() if name == track or _lane_of(name, track)]

    def _names(self, what: str, key: str) -> dict[int, str]:
        found: dict[int, str] = {}
        for event in self.named(what, "M"):
            assert event[key] not in found, f"{event} names a second time"
            found[event[key]] = event["args"]["name"]
        return found

    def _arrows(self) -> dict[int, list[Event]]:
        """Of each arrow's id the slices that it joins, in order."""
        points: dict[int, list[Event]] = defaultdict(list)
        for event in self.of("s", "t", "f"):
            points[event["id"]].append(event)
        joined = {}
        for arrow_id, events in points.items():
            phases = "".join(event["ph"] for event in events)
            assert re.fullmatch("st*f", phases), f"arrow {arrow_id}: {phases}"
            assert [e["ts"] for e in events] == sorted(e["ts"] for e in events)
            assert len({(e["name"], e["cat"]) for e in events}) == 1
            joined[arrow_id] = [self._around(event) for event in events]
        return joined

    def _around(self, point: Event) -> Event:
        found = [
            piece
            for piece in self._by_thread[point["tid"]]
            if piece["ts"] <= point["ts"] <= piece["ts"] + piece["dur"] and piece["pid"] == point["pid"]
        ]
        assert found, f"{point} is within no slice"
        return found[-1]


def _lane_of(name: str, track: str) -> bool:
    head, _, number = name.rpartition(" ")
    return head == track and number.isdigit()


def _check(event: Event) -> None:
    phase = event["ph"]
    assert _KEYS[phase] <= set(event), event
    assert isinstance(event["name"], str), event
    assert event["name"], event
    assert event["name"].isprintable(), event
    for key in ("pid", "tid", "ts", "dur", "id"):
        if key in event:
            assert isinstance(event[key], int), event
            assert 0 <= event[key] < 2**53 // 1000, event
    assert all(math.isfinite(number) for number in _numbers(event)), event
    if phase == "i":
        assert event["s"] in ("g", "p", "t")
    if phase == "C":
        assert event["args"], event
        assert all(isinstance(value, int | float) for value in event["args"].values()), event
    if phase == "M":
        key, kind = _METADATA[event["name"]]
        assert isinstance(event["args"][key], kind), event


def _numbers(value: object) -> Iterable[float]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _numbers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner)
    elif isinstance(value, int | float):
        yield value


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")
