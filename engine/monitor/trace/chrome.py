"""The Chrome trace event format, as far as a trace of a run needs it: what ui.perfetto.dev and chrome://tracing read.
Knows nothing of runs.

``ts`` and ``dur`` are microseconds since a zero of the trace's own, which lies no further back than it must:
chrome://tracing makes them milliseconds in floating point, and those since 1970 are only good to a quarter of a
microsecond, so that slices that touch would overlap. What is shown counts from the first event anyway. Viewers sort by
time, so events may be written in any order. ``ph``, ``ts``, ``pid`` and ``tid`` come first in each: Perfetto's reader
looks for them before it parses the rest.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from typing import Any

import msgspec

from engine.monitor.sentences import printable
from engine.monitor.trace.journeys import Journey

TraceEvent = dict[str, Any]

_MAX_TEXT = 500
"""Characters of one argument: an answer or a traceback has its place in the log."""
_MAX_NAME = 120


def complete(
    name: str, *, category: str, pid: int, tid: int, start_us: int, end_us: int, args: Mapping[str, object]
) -> TraceEvent:
    """A piece of work, or a wait. Those of one track must not overlap."""
    return {
        "ph": "X",
        "ts": start_us,
        "dur": end_us - start_us,
        "pid": pid,
        "tid": tid,
        "name": label(name),
        "cat": category,
        "args": args,
    }


def instant(name: str, *, category: str, pid: int, tid: int, at_us: int, args: Mapping[str, object]) -> TraceEvent:
    return {
        "ph": "i",
        "ts": at_us,
        "pid": pid,
        "tid": tid,
        "s": "t",
        "name": label(name),
        "cat": category,
        "args": args,
    }


def counter(name: str, *, pid: int, at_us: int, series: Mapping[str, float]) -> TraceEvent:
    """Values that hold until the next ones of this name."""
    return {"ph": "C", "ts": at_us, "pid": pid, "tid": pid, "name": label(name), "args": series}


def arrows(name: str, journey: Journey, *, arrow_id: int) -> Iterator[TraceEvent]:
    """Arrows from each slice of a journey to the next; ``arrow_id`` is used for no other one.

    An arrow leaves its first slice at the end and enters the others at their start, one microsecond inside: at the very
    edge it would belong to whichever slice is read first.
    """
    times = [min(place.start_us + 1, place.end_us) for place in journey]
    times[0] = max(journey[0].start_us, journey[0].end_us - 1)
    for index in range(len(times) - 2, -1, -1):  # slices may overlap; an arrow must not go back
        times[index] = min(times[index], times[index + 1])
    last = len(journey) - 1
    for index, (at_us, place) in enumerate(zip(times, journey, strict=True)):
        event: TraceEvent = {
            "ph": "s" if index == 0 else "f" if index == last else "t",
            "ts": at_us,
            "pid": place.pid,
            "tid": place.tid,
            "id": arrow_id,
            "name": name,
            "cat": name,
        }
        if index == last:
            event["bp"] = "e"  # the slice around it, not the next one that begins
        yield event


def process_name(pid: int, name: str, *, order: int) -> Iterator[TraceEvent]:
    yield {"ph": "M", "pid": pid, "tid": pid, "name": "process_name", "args": {"name": label(name)}}
    yield {"ph": "M", "pid": pid, "tid": pid, "name": "process_sort_index", "args": {"sort_index": order}}


def thread_name(pid: int, tid: int, name: str, *, order: int) -> Iterator[TraceEvent]:
    yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": label(name)}}
    yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": order}}


def arguments(fields: Mapping[str, object], *, without: Container[str]) -> dict[str, object]:
    """What a viewer shows of a slice that is clicked on: numbers, truth values and short texts. What is null is left
    out, lists become text: Perfetto makes a row of every element, and a step has thousands of rollouts."""
    return {key: _plain(value) for key, value in fields.items() if value is not None and key not in without}


def label(text: str) -> str:
    """A name that any viewer can show: on one line, not empty, not endless."""
    text = text if text.isprintable() else printable(text)
    return (text if len(text) <= _MAX_NAME else f"{text[: _MAX_NAME - 1]}…") or "unnamed"


def _plain(value: object) -> object:
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if -(1 << 63) <= value < 1 << 63 else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"
