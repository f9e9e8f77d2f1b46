"""From lines of the log to what a sink is given: one point per optimizer step and one per held-out measurement, with
every number of it under a name that groups. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec

from engine.metric_catalogue import (
    EVALUATION_METRICS,
    OBJECTIVE_METRICS,
    RANK_METRICS,
    STEP_METRICS,
    StepMetric,
    undeclared,
)
from engine.step_log import StepRows, plain
from engine.tracing import Event

TRAIN, EVALUATION = "train/", "eval/"
"""Dashboards make a group of names that begin alike."""

_NOT_MEASURED = frozenset(("t", "step", "version"))
_DECLARED: Mapping[str, StepMetric] = {
    **{TRAIN + metric.name: metric for metric in (*STEP_METRICS, *OBJECTIVE_METRICS, *RANK_METRICS)},
    **{EVALUATION + metric.name: metric for metric in EVALUATION_METRICS},
}


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured at one time."""

    step: int
    """Optimizer steps done."""
    at_s: float
    """Seconds since 1970, UTC."""
    values: Mapping[str, float]
    """By grouped name. A loss may be NaN."""


class Points:
    """Turns the lines of one process into points, in the order in which they come."""

    def __init__(self) -> None:
        self._rows = StepRows()

    def point(self, event: Event) -> Point | None:
        """None: the line measures nothing, or its work failed."""
        row = self._rows.row(event)
        if row is not None:
            return _point(event, row["step"], TRAIN, row)
        if event["event"] == "eval.run" and event.get("outcome") == "ok":
            values = {metric.name: plain(event.get(metric.name)) for metric in EVALUATION_METRICS}
            return _point(event, event["version"], EVALUATION, values)
        return None


def describe(name: str) -> str:
    """Unit, reduction and meaning of a grouped name, for people."""
    metric = _DECLARED.get(name) or undeclared(name)
    return f"{metric.unit or 'unit not declared'}, {metric.reduction}. {metric.doc}".rstrip()


def _point(event: Event, step: int, group: str, values: Mapping[str, Any]) -> Point:
    numbers = {
        group + name: float(value)
        for name, value in values.items()
        if name not in _NOT_MEASURED and isinstance(value, bool | int | float)
    }
    return Point(step=step, at_s=datetime.fromisoformat(event["t"]).timestamp(), values=numbers)
