"""Every metric is declared once, and the docs say the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from engine.metric_catalogue import (
    EVALUATION_METRICS,
    METRICS,
    OBJECTIVE_METRICS,
    RANK_METRICS,
    STEP_METRICS,
    Metric,
    StepMetric,
    undeclared,
)
from ops.solved import METRICS as MEASURED_BY_OBJECTIVES

DOCUMENT = Path(__file__).parents[2] / "docs" / "observability.md"
COLUMNS = (*STEP_METRICS, *OBJECTIVE_METRICS, *RANK_METRICS, *EVALUATION_METRICS)
UNIT_SUFFIXES = ("_seconds", "_nats", "_versions", "_tokens", "_items")
WITHOUT_UNIT = {"1", "rollouts", "steps", "requests", "attempts", "restarts", "sequences", "lines"}


def series_table(metrics: Sequence[Metric]) -> str:
    rows = ["| name | kind | unit | reduction | labels | meaning |", "|---|---|---|---|---|---|"]
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        cells = (f"`{metric.name}`", metric.kind, metric.unit, metric.reduction, labels, metric.doc)
        rows.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return "\n".join(rows)


def column_table(metrics: Sequence[StepMetric]) -> str:
    rows = ["| name | unit | reduction | meaning |", "|---|---|---|---|"]
    rows += [f"| `{metric.name}` | {metric.unit} | {metric.reduction} | {metric.doc} |" for metric in metrics]
    return "\n".join(rows)


def test_series_end_in_their_unit_and_counters_in_total() -> None:
    for metric in METRICS:
        name = metric.name.removesuffix("_total")
        assert (metric.kind == "counter") == metric.name.endswith("_total"), metric.name
        unit = metric.unit.split()[0]
        assert name.endswith(f"_{unit}") or unit in WITHOUT_UNIT, f"{metric.name} is in {metric.unit}"
    assert len({metric.name for metric in METRICS}) == len(METRICS)


@pytest.mark.parametrize("metric", [*METRICS, *COLUMNS], ids=lambda metric: metric.name)
def test_every_metric_says_its_unit_and_what_it_means_in_a_sentence(metric: Metric | StepMetric) -> None:
    assert metric.unit
    assert metric.doc.endswith(".")
    assert "|" not in metric.doc


@pytest.mark.parametrize(
    "columns", [(*STEP_METRICS, *OBJECTIVE_METRICS, *RANK_METRICS), EVALUATION_METRICS], ids=["steps", "evals"]
)
def test_a_column_is_declared_once(columns: Sequence[StepMetric]) -> None:
    assert len({metric.name for metric in columns}) == len(columns)


def test_what_the_objectives_measure_on_the_side_is_declared() -> None:
    assert [metric.name for metric in OBJECTIVE_METRICS] == list(MEASURED_BY_OBJECTIVES)


def test_a_metric_of_a_trainer_of_yours_has_no_unit() -> None:
    assert undeclared("reward").unit == ""


@pytest.mark.parametrize(
    "table",
    [
        series_table(METRICS),
        column_table(STEP_METRICS),
        column_table(OBJECTIVE_METRICS),
        column_table(RANK_METRICS),
        column_table(EVALUATION_METRICS),
    ],
    ids=["series", "steps", "objectives", "ranks", "evaluations"],
)
def test_the_docs_hold_the_declarations(table: str) -> None:
    assert table in DOCUMENT.read_text(), f"put this table into {DOCUMENT.name}:\n{table}"
