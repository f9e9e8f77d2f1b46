"""From ``learner.step`` lines of the log to rows, one per optimizer step, and into ``metrics.jsonl``. Decides what a
row holds; what its columns mean is ``engine.metric_catalogue``'s."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from engine.metric_catalogue import STEP_METRICS
from engine.tracing import Event

Row = Mapping[str, Any]
"""Declared metrics first, in their order; then what the objective measured on the side, under its own names."""

_NOT_A_METRIC = frozenset(
    (
        "event",
        "level",
        "kind",
        "run",
        "node",
        "actor",
        "version",
        "outcome",
        "start_ns",
        "dur_us",
        "ages",
        "rollout_ids",
    )
)


class StepRows:
    """Turns the lines of one process into rows, in the order in which they come."""

    def __init__(self) -> None:
        self._last_at: datetime | None = None

    def row(self, event: Event) -> Row | None:
        """None: the line is of something else, or of a step that failed."""
        if event["event"] != "learner.step" or event.get("outcome") != "ok":
            return None
        at = datetime.fromisoformat(event["t"])
        interval_s = None if self._last_at is None else (at - self._last_at).total_seconds()
        self._last_at = at
        values = {**event, "interval_s": interval_s}
        row = {metric.name: plain(values.pop(metric.name, None)) for metric in STEP_METRICS}
        row.update((key, plain(value)) for key, value in values.items() if key not in _NOT_A_METRIC)
        return row


class StepLog:
    """Appends one line per optimizer step to a file: ``tracing.subscribe("metrics.jsonl", StepLog(path).apply)``.

    A resumed run writes the steps after its checkpoint again: a line holds until one of the same or an earlier step
    follows. A line that a killed process or a full disk left unfinished is ended first.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows = StepRows()

    def apply(self, event: Event) -> None:
        """Take in one line of the log.

        Raises:
            OSError: the file cannot be written.
        """
        row = self._rows.row(event)
        if row is None:
            return
        with self._path.open("ab+") as file:
            is_torn = False
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                is_torn = file.read(1) != b"\n"
            file.write(b"\n" * is_torn + msgspec.json.encode(row) + b"\n")


def plain(value: Any) -> Any:
    """A number, text or null, also of what a trainer of the user's gave as a NumPy or torch scalar."""
    # Exactly these: NumPy's float64 is a float that JSON encoders do not know.
    if value is None or type(value) in (bool, int, float, str):
        return value
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return str(value)
