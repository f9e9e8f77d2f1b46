"""Reads what a run logged, from whole, growing or damaged files, as one stream in the order of time. Knows the form of
a line (docs/events.md, "The file") and nothing of what lines mean."""

from __future__ import annotations

import heapq
import os
import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import RunDirError

_MAX_LINE_BYTES = 16 << 20
"""Longer ones are no lines of ours: a file that a power cut left full of zeros is one line of a gigabyte."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_END_OF_TIME_US = 7_000_000_000_000_000
"""Year 2191. Viewers hold nanoseconds in 64 bits, so one line of the year 9999 would spoil the whole trace."""

_decode = msgspec.json.Decoder(dict[str, Any]).decode


class LogLine(msgspec.Struct, frozen=True):
    """One line that is of the log's form."""

    at_us: int
    """``t``, in microseconds since 1970."""
    source: int
    """Which file it stands in."""
    event: str
    fields: dict[str, Any]
    """The whole line."""


class LogFile:
    """One file, read as far as it reached when reading began: a live run does not keep its reader busy for ever.

    What was left out is known when ``lines`` has ended.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_lines = 0
        self.num_left_out = 0
        """Lines, the last one aside, that are not JSON, or not of the log's form."""
        self.first_left_out = 0
        """Number of the first of them, counted from 1."""
        self.is_torn = False
        """The last line is not complete: it is being written, or its process was killed."""

    def lines(self, source: int) -> Iterator[LogLine]:
        """Every line that can be read, in the order of the file.

        Raises:
            RunDirError: the file cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                end = os.fstat(file.fileno()).st_size
                position = 0
                while position < end and (raw := file.readline(_MAX_LINE_BYTES)):
                    position += len(raw)
                    is_complete = raw.endswith(b"\n")
                    is_too_long = not is_complete and len(raw) == _MAX_LINE_BYTES
                    while is_too_long and not is_complete and (rest := file.readline(_MAX_LINE_BYTES)):
                        position += len(rest)
                        is_complete = rest.endswith(b"\n")
                    if raw.isspace():
                        continue  # where a killed process had torn a line of no bytes
                    self.num_lines += 1
                    line = None if is_too_long else parse(raw, source)
                    if line is not None:
                        yield line
                    elif is_complete:
                        self.num_left_out += 1
                        self.first_left_out = self.first_left_out or self.num_lines
                    else:
                        self.is_torn = True
        except OSError as error:
            raise RunDirError(f"cannot read {self.path}: {error.strerror}; mend its permissions") from error


def parse(raw: bytes, source: int = 0) -> LogLine | None:
    """One line; None when it is not JSON, or has no time or name."""
    try:
        fields = _decode(raw)
        event, at_us = fields["event"], micros(fields["t"])
    except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError, msgspec.MsgspecError):
        return None
    if not isinstance(event, str) or not 0 <= at_us < _END_OF_TIME_US:
        return None
    return LogLine(at_us, source, event, fields)


def micros(t: str) -> int:
    """ISO 8601 → microseconds since 1970; without a zone it is UTC.

    Raises:
        ValueError, TypeError: it is no such text.
    """
    moment = datetime.fromisoformat(t)
    since = (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)) - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def merged(files: Iterable[LogFile]) -> Iterator[LogLine]:
    """The lines of all files by time; those of one file stay in their order."""
    streams = [file.lines(source) for source, file in enumerate(files)]
    return streams[0] if len(streams) == 1 else heapq.merge(*streams, key=lambda line: line.at_us)


def find_logs(run_dir: Path) -> list[Path]:
    """The logs of all processes of a run: ``events.jsonl`` first, then ``events-NODE.jsonl`` with numbers in order.

    Raises:
        RunDirError: no such folder, or no log in it; says where some are.
    """
    if not os.path.exists(run_dir):
        raise RunDirError(f"there is no folder {run_dir}; give the folder of a run, the one that holds events.jsonl")
    if not os.path.isdir(run_dir):
        raise RunDirError(f"{run_dir} is a file; give the folder of the run: {run_dir.parent}")
    try:
        found = sorted((path for path in run_dir.iterdir() if _is_log(path)), key=_order)
        inside = [] if found else sorted(path.parent for path in run_dir.glob("*/events.jsonl"))
    except OSError as error:
        raise RunDirError(f"cannot look into {run_dir}: {error.strerror}; mend its permissions") from error
    if not found:
        hint = f"; give one of the folders in it, such as {inside[-1]}" if inside else ""
        raise RunDirError(f"{run_dir} holds no log of a run, expected events.jsonl in it{hint}")
    return found


def _is_log(path: Path) -> bool:
    return path.match("events*.jsonl") and path.is_file()


def _order(path: Path) -> tuple[bool, list[str | int]]:
    parts: list[str | int] = [*re.split(r"(\d+)", path.name)]
    parts[1::2] = [int(part) for part in parts[1::2]]
    return path.name != "events.jsonl", parts
