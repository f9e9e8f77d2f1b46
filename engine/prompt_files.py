"""What a prompt file says: its rows, read and checked one by one, before any token is made.

It decides which rows take part and what is wrong with one that cannot; it knows no tokenizer. A JSONL row is a line
that is not blank, a Parquet row is a row; both are counted from 0, while errors name JSONL lines from 1 as editors do.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from engine.errors import DataAbsent, DataError
from engine.recipe import DataConfig

__all__ = ["RawRow", "read_rows"]

_BATCH_ROWS: Final = 512
_BOM: Final = b"\xef\xbb\xbf"


class RawRow(msgspec.Struct, frozen=True):
    """A checked row, not yet tokenized."""

    where: str
    """File and line or row, for errors."""
    prompt_index: int
    prompt: str | list[dict[str, Any]]
    """A text that is not blank, or at least one message, the last of them not the assistant's."""
    reference: str | None


def read_rows(config: DataConfig, *, name: str) -> Iterator[RawRow]:
    """The rows that ``config`` names, in the order of the file; read as they are asked for.

    ``name`` is which part of the recipe ``config`` is. Raises as ``engine.prompts.load_prompts``.
    """
    path = Path(config.path)
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.is_dir():
        raise DataError(f"{name}.path={config.path!r}: is a folder; expected a .jsonl or .parquet file")
    if path.suffix not in readers:
        raise DataError(
            f"{name}.path={config.path!r}: unknown kind of file {path.suffix!r}; expected .jsonl or .parquet"
        )
    if not path.is_file():
        raise DataAbsent(
            f"{name}.path={config.path!r}: there is no such file", remedy="expected a .jsonl or .parquet file"
        )
    try:
        yield from readers[path.suffix](path, config, name)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read_jsonl(path: Path, config: DataConfig, name: str) -> Iterator[RawRow]:
    end = None if config.num_rows is None else config.first_row + config.num_rows
    row_index = -1
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(_BOM) if number == 1 else line
            if not text.strip():
                continue
            row_index += 1
            if row_index < config.first_row:
                continue
            if end is not None and row_index >= end:
                return
            where = f"{path}:{number}"
            yield _check_row(_parse(text, where), row_index, where, config, name)


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); expected one object per line") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: {_kind(value)}; expected one object per line")
    return value


def _read_parquet(path: Path, config: DataConfig, name: str) -> Iterator[RawRow]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataAbsent(
            f"{path}: reading Parquet needs pyarrow",
            remedy="install it (pip install pyarrow) or use .jsonl",
            bring="pip install pyarrow",
        ) from error
    columns = [config.prompt_column, *([config.reference_column] if config.reference_column is not None else [])]
    end = None if config.num_rows is None else config.first_row + config.num_rows
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for column in columns:
                if column not in file.schema_arrow.names:
                    raise DataError(
                        f"{path}: no column {column!r}; the columns are {', '.join(map(repr, file.schema_arrow.names))}"
                    )
            row_index = -1
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                if row_index + batch.num_rows < config.first_row:
                    row_index += batch.num_rows
                    continue
                for row in batch.to_pylist():
                    row_index += 1
                    if row_index < config.first_row:
                        continue
                    if end is not None and row_index >= end:
                        return
                    yield _check_row(row, row_index, f"{path} row {row_index}", config, name)
    except UnicodeDecodeError as error:  # Arrow trusts the file until a value is made a str
        raise DataError(
            f"{path}: a text in rows {row_index + 1} to {row_index + batch.num_rows} is not UTF-8 ({error.reason}); "
            "write the file again with UTF-8 texts"
        ) from error
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a Parquet file that can be read ({error})") from error


def _check_row(row: dict[str, Any], row_index: int, where: str, config: DataConfig, name: str) -> RawRow:
    if config.prompt_column not in row:
        raise DataError(
            f"{where}: no {config.prompt_column!r} (set {name}.prompt_column); the row has "
            f"{', '.join(map(repr, row)) or 'no column'}"
        )
    prompt = row[config.prompt_column]
    if isinstance(prompt, str):
        if not prompt.strip():
            raise DataError(f"{where}: {config.prompt_column!r} is empty")
    elif isinstance(prompt, list):
        _check_messages(prompt, where, config.prompt_column)
    else:
        raise DataError(
            f"{where}: {config.prompt_column!r} is {_kind(prompt)}; expected a string or a list of "
            '{"role", "content"} messages'
        )
    reference = None if config.reference_column is None else row.get(config.reference_column)
    if reference is not None and not isinstance(reference, str):
        raise DataError(f"{where}: {config.reference_column!r} is {_kind(reference)}; expected a string, or null")
    if reference is not None and not reference.strip():
        raise DataError(f"{where}: {config.reference_column!r} is empty; use null for a row without a reference")
    return RawRow(where, row_index, prompt, reference)


def _check_messages(messages: list[Any], where: str, column: str) -> None:
    if not messages:
        raise DataError(f"{where}: {column!r} is an empty list; expected at least one message")
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DataError(
                f'{where}: message {number} of {column!r} is {_kind(message)}; expected {{"role", "content"}}'
            )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                what = _kind(message[key]) if key in message else "missing"
                raise DataError(f"{where}: message {number} of {column!r}: {key!r} is {what}; expected a string")
    if messages[-1]["role"] == "assistant":
        raise DataError(
            f"{where}: the last message of {column!r} is the assistant's; a prompt ends where the student is to answer"
        )


def _kind(value: object) -> str:
    """A JSON value's type in the words of JSON."""
    kinds: dict[type, str] = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return kinds.get(type(value), f"of type {type(value).__name__}")
