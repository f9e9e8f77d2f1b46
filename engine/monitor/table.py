"""Lines of ``metrics.jsonl`` or ``evaluations.jsonl`` as a table: which lines count, which columns there are and what
each holds. Decides nothing about how a table is written.

A file is read twice, once to find out and once to hand the rows on, so that what is in memory does not grow with what
the rows hold.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import msgspec

from engine.errors import UserError
from engine.metric_catalogue import StepMetric, undeclared

Kind = Literal["count", "number", "flag", "time", "text"]
"""What every value of a column is, where there is one: int64, float64, true or false, ISO 8601 in UTC, text."""

_INT64 = range(-(2**63), 2**63)


class Column(msgspec.Struct, frozen=True, kw_only=True):
    metric: StepMetric
    kind: Kind

    @property
    def name(self) -> str:
        return self.metric.name


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """What ``read_table`` found; ``rows`` reads the file again."""

    path: Path
    columns: tuple[Column, ...]
    """Declared ones first, also where no line has them; then the others in the order in which they turned up."""
    num_rows: int
    num_unreadable: int
    """Lines that are no JSON object with the key: torn by a kill, or not ours."""
    num_undone: int
    """Rows that a later one made void: the run was resumed from before them."""
    offsets: Sequence[int]
    """Of the lines that count, in bytes."""

    def rows(self) -> Iterator[list[Any]]:
        """In ascending order of the key; a value is of its column's kind, or None."""
        if not self.offsets:
            return
        decoder = msgspec.json.Decoder(dict[str, Any])
        with self.path.open("rb") as file:
            for offset in self.offsets:
                file.seek(offset)
                line = decoder.decode(file.readline())
                yield [_of_kind(line.get(column.name), column.kind) for column in self.columns]


def read_table(path: Path, *, key: str, declared: Sequence[StepMetric], known: Sequence[StepMetric] = ()) -> Table:
    """Look through a file of JSON lines; one that is not there is empty.

    The file may be growing. A line with a key that is not above that of the line before was written after a resumption
    from an earlier checkpoint: it makes void all lines from its key on, because the weights they speak of are gone.

    Args:
        key: the column that counts up, an integer.
        declared: columns that are always there.
        known: what to say of other columns, when they turn up. Keys that hold lists or objects are no columns.

    Raises:
        UserError: the file cannot be read.
    """
    keys, offsets = array("q"), array("Q")
    kinds: dict[str, Kind | None] = {metric.name: metric.kind for metric in declared}
    num_unreadable = num_undone = 0
    try:
        for offset, row in _lines(path):
            value = None if row is None else row.get(key)
            if row is None or type(value) is not int or value not in _INT64:
                num_unreadable += 1
                continue
            while keys and keys[-1] >= value:
                keys.pop()
                offsets.pop()
                num_undone += 1
            keys.append(value)
            offsets.append(offset)
            _widen(kinds, row)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    metrics = {metric.name: metric for metric in (*declared, *known)}
    return Table(
        path=path,
        columns=tuple(
            Column(metric=metrics.get(name) or undeclared(name), kind=kind or "number") for name, kind in kinds.items()
        ),
        num_rows=len(keys),
        num_unreadable=num_unreadable,
        num_undone=num_undone,
        offsets=offsets,
    )


def _lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | None]]:
    """Where each line that is not blank begins, and what it says; None: nothing that can be read."""
    if not path.exists():
        return
    decoder = msgspec.json.Decoder(dict[str, Any])
    offset = 0
    with path.open("rb") as file:
        for line in file:
            if not line.isspace():
                try:
                    yield offset, decoder.decode(line)
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                    yield offset, None
            offset += len(line)


def _widen(kinds: dict[str, Kind | None], row: Mapping[str, Any]) -> None:
    """Make every column wide enough for what ``row`` holds."""
    for name, value in row.items():
        if isinstance(value, list | dict):
            continue
        before, kind = kinds.setdefault(name, None), _kind_of(value)
        if kind is not None and kind != before:
            kinds[name] = kind if before is None else _wider(before, kind, value)


def _wider(before: Kind, kind: Kind, value: Any) -> Kind:
    if {before, kind} == {"count", "number"}:
        return "number"
    return "time" if before == "time" and _is_time(value) else "text"


def _kind_of(value: Any) -> Kind | None:
    if isinstance(value, bool):
        return "flag"
    if isinstance(value, int):
        return "count" if value in _INT64 else "text"
    if isinstance(value, float):
        return "number"
    return "text" if isinstance(value, str) else None


def _is_time(value: Any) -> bool:
    try:
        return datetime.fromisoformat(value).tzinfo is not None
    except (TypeError, ValueError):
        return False


def _of_kind(value: Any, kind: Kind) -> Any:
    if value is None or isinstance(value, list | dict):
        return None
    if kind == "number":
        return float(value)
    if kind == "text" and not isinstance(value, str):
        return msgspec.json.encode(value).decode()
    return value
