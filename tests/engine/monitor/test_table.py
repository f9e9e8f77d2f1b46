"""Which lines of a file count, and what its columns hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import UserError
from engine.metric_catalogue import StepMetric
from engine.monitor.table import Table, read_table

STEP = StepMetric(name="step", unit="steps", reduction="last", doc="", kind="count")
LOSS = StepMetric(name="loss", unit="nats", reduction="mean over tokens", doc="")
TIME = StepMetric(name="t", unit="UTC", reduction="last", doc="", kind="time")


def table(path: Path, *rows: dict[str, Any] | bytes, declared: tuple[StepMetric, ...] = (STEP, LOSS)) -> Table:
    file = path / "metrics.jsonl"
    file.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return read_table(file, key="step", declared=declared)


def kinds(read: Table) -> dict[str, str]:
    return {column.name: column.kind for column in read.columns}


def test_a_step_that_was_trained_again_counts_once_and_as_it_was_the_last_time(tmp_path: Path) -> None:
    read = table(tmp_path, *({"step": step, "loss": 1.0} for step in (1, 2, 3)), *({"step": s} for s in (2, 3, 4)))

    assert list(read.rows()) == [[1, 1.0], [2, None], [3, None], [4, None]]
    assert read.num_undone == 2


def test_steps_behind_which_the_run_went_back_do_not_count_although_nobody_has_trained_them_again(
    tmp_path: Path,
) -> None:
    read = table(tmp_path, *({"step": step, "loss": 1.0} for step in (1, 2, 3, 4)), {"step": 2, "loss": 0.5})

    assert list(read.rows()) == [[1, 1.0], [2, 0.5]]


@given(st.lists(st.integers(min_value=1, max_value=8), max_size=40))
def test_what_counts_is_what_a_history_that_can_be_rewound_holds(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int]
) -> None:
    history: list[list[float]] = []
    for number, step in enumerate(steps):
        history = [[s, loss] for s, loss in history if s < step] + [[step, float(number)]]

    read = table(
        tmp_path_factory.mktemp("run"), *({"step": s, "loss": float(number)} for number, s in enumerate(steps))
    )

    assert list(read.rows()) == history
    assert (read.num_rows, read.num_undone) == (len(history), len(steps) - len(history))


@pytest.mark.parametrize(
    "torn",
    [
        b'{"step":2,"lo',
        b"\n",
        b"null\n",
        b"[1]\n",
        b'{"loss":1}\n',
        b'{"step":"2"}\n',
        b'{"step":true}\n',
        b'{"step":2.0}\n',
        b'{"step":99999999999999999999}\n',
        b"\xff\n",
        b"\x00\n",
        b"[" * 100_000,
    ],
)
def test_what_is_no_row_is_passed_over(tmp_path: Path, torn: bytes) -> None:
    read = table(tmp_path, {"step": 1, "loss": 0.5}, torn)

    assert list(read.rows()) == [[1, 0.5]]
    assert read.num_unreadable == (0 if torn.isspace() else 1)


def test_a_last_line_without_its_newline_counts_when_it_is_whole(tmp_path: Path) -> None:
    assert list(table(tmp_path, b'{"step":1,"loss":2}').rows()) == [[1, 2.0]]


def test_a_file_that_is_not_there_is_a_table_of_declared_columns(tmp_path: Path) -> None:
    read = read_table(tmp_path / "metrics.jsonl", key="step", declared=(STEP, LOSS))

    assert (list(read.rows()), kinds(read)) == ([], {"step": "count", "loss": "number"})


def test_columns_are_the_declared_ones_and_then_what_turns_up(tmp_path: Path) -> None:
    read = table(tmp_path, {"reward": 1, "step": 1}, {"step": 2, "answers": [1], "facts": {"a": 1}, "reward": 0.5})

    assert [column.name for column in read.columns] == ["step", "loss", "reward"]
    assert read.columns[2].metric.unit == ""
    assert list(read.rows()) == [[1, None, 1.0], [2, None, 0.5]]


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([1, None, 2], "count", [1, None, 2]),
        ([1, 0.5], "number", [1.0, 0.5]),
        ([None, None], "number", [None, None]),
        ([True, False], "flag", [True, False]),
        ([True, 1], "text", ["true", "1"]),
        ([1, "much"], "text", ["1", "much"]),
        ([2**70], "text", [str(2**70)]),
    ],
)
def test_a_column_is_as_wide_as_what_it_holds(
    tmp_path: Path, values: list[Any], kind: str, expected: list[Any]
) -> None:
    read = table(tmp_path, *({"step": step, "x": value} for step, value in enumerate(values)), declared=(STEP,))

    assert kinds(read)["x"] == kind
    assert [row[1] for row in read.rows()] == expected


def test_a_time_is_one_only_with_its_zone(tmp_path: Path) -> None:
    rows = [{"step": 1, "t": "2026-01-02T03:04:05.5+00:00"}]

    assert kinds(table(tmp_path, *rows, declared=(TIME, STEP)))["t"] == "time"
    assert kinds(table(tmp_path, *rows, {"step": 2, "t": "2026-01-02"}, declared=(TIME, STEP)))["t"] == "text"


def test_rows_are_read_as_they_were_when_the_table_was_made_although_the_run_goes_on(tmp_path: Path) -> None:
    read = table(tmp_path, {"step": 1, "loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step":2,"loss":0.5}\n')

    assert list(read.rows()) == [[1, 1.0]]


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_table(tmp_path, key="step", declared=(STEP,))
