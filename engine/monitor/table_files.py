"""Tables as CSV or Parquet, for notebooks and spreadsheets. Decides what a value looks like in each format."""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from engine.errors import UserError
from engine.monitor.table import Column, Table

_ROWS_AT_A_TIME = 65_536


def check_target(path: Path) -> None:
    """Whether ``write_table`` knows this kind of file and has a folder for it.

    Raises:
        UserError: it does not, and why.
    """
    if path.suffix.lower() not in (".csv", ".parquet"):
        raise UserError(f"{path}: unknown kind of file {path.suffix!r}; expected a name that ends in .csv or .parquet")
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it, or name another file")
    if path.suffix.lower() == ".parquet":
        _parquet()


def write_table(table: Table, path: Path) -> None:
    """Write aside and rename: who reads ``path`` finds the old file or the whole new one.

    Raises:
        UserError: the file cannot be written, the format is unknown, or Parquet is not installed.
    """
    check_target(path)
    with _aside(path) as aside:
        if path.suffix.lower() == ".parquet":
            _write_parquet(table, aside)
        else:
            with aside.open("w", encoding="utf-8", newline="") as file:
                write_csv(table, file)


def write_csv(table: Table, file: TextIO) -> None:
    """One line of names, then one per row. Nothing is an empty cell, a flag is true or false, a float has all the
    digits that it takes to get the same bits back."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([column.name for column in table.columns])
    for row in table.rows():
        writer.writerow([_cell(value) for value in row])


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return value


def _write_parquet(table: Table, path: Path) -> None:
    pyarrow = _parquet()
    schema = pyarrow.schema([_field(column) for column in table.columns])
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        rows = table.rows()
        while batch := list(itertools.islice(rows, _ROWS_AT_A_TIME)):
            columns = [
                pyarrow.array([_moment(value) for value in values] if column.kind == "time" else values, field.type)
                for column, field, values in zip(table.columns, schema, zip(*batch, strict=True), strict=True)
            ]
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))


def _field(column: Column) -> Any:
    pyarrow = _parquet()
    types = {
        "count": pyarrow.int64(),
        "number": pyarrow.float64(),
        "flag": pyarrow.bool_(),
        "time": pyarrow.timestamp("us", tz="UTC"),
        "text": pyarrow.string(),
    }
    metric = column.metric
    about = {"unit": metric.unit, "reduction": metric.reduction, "description": metric.doc}
    return pyarrow.field(column.name, types[column.kind], metadata=about)


def _moment(value: str | None) -> datetime | None:
    return None if value is None else datetime.fromisoformat(value)


def _parquet() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "writing Parquet needs pyarrow, which is not installed; pip install 'slipstream[parquet]', or name a .csv "
            "file"
        ) from error
    return pyarrow


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        aside.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; make room, or name another file") from error
    finally:
        aside.unlink(missing_ok=True)
