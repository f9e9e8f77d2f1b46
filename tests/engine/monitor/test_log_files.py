"""Logs as they are found: torn, damaged, of several processes, in the wrong folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import RunDirError
from engine.monitor import log_files
from engine.monitor.log_files import LogFile, find_logs, merged, micros, parse

FIRST = "2026-01-02T03:04:05.000001+00:00"


def line(second: int = 5, event: str = "run.started", **fields: object) -> bytes:
    return json.dumps({"t": f"2026-01-02T03:04:{second:02}.000001+00:00", "event": event, **fields}).encode() + b"\n"


def read(path: Path) -> tuple[LogFile, list[str]]:
    file = LogFile(path)
    return file, [found.event for found in file.lines(0)]


def log_of(folder: Path, content: bytes, name: str = "events.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def test_a_torn_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    file, events = read(log_of(tmp_path, line(event="a.b") + line(event="c.d")[:-9]))

    assert (events, file.is_torn, file.num_left_out) == (["a.b"], True, 0)


def test_a_last_line_that_lacks_only_its_newline_counts(tmp_path: Path) -> None:
    file, events = read(log_of(tmp_path, line(event="a.b").rstrip()))

    assert (events, file.is_torn) == (["a.b"], False)


def test_damaged_lines_in_the_middle_are_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    damaged = b'{"t":"2026-01-02T03:04\n' + b"\x00" * 40 + b"\n" + b'["a list"]\n' + b"\xff\xfe\n" + b"\n"
    file, events = read(log_of(tmp_path, line(event="a.b") + damaged + line(event="c.d")))

    assert events == ["a.b", "c.d"]
    assert (file.num_left_out, file.first_left_out, file.num_lines) == (4, 2, 6)


def test_an_empty_file_has_no_lines(tmp_path: Path) -> None:
    file, events = read(log_of(tmp_path, b""))

    assert (events, file.num_lines, file.is_torn) == ([], 0, False)


def test_a_line_without_end_is_passed_over_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_files, "_MAX_LINE_BYTES", 128)
    file, events = read(log_of(tmp_path, line(event="a.b") + b"\x00" * 1000 + b"\n" + line(event="c.d")))

    assert (events, file.num_left_out) == (["a.b", "c.d"], 1)


def test_what_is_written_after_reading_began_is_not_waited_for(tmp_path: Path) -> None:
    path = log_of(tmp_path, line() * 3)
    file = LogFile(path)
    found = []
    for read_line in file.lines(0):
        found.append(read_line)
        with path.open("ab") as log:
            log.write(line())

    assert len(found) == 3


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"17",
        b"{}",
        b'{"event":"a.b"}',
        b'{"t":"yesterday","event":"a.b"}',
        b'{"t":17,"event":"a.b"}',
        f'{{"t":"{FIRST}","event":17}}'.encode(),
        b'{"t":"0001-01-01T00:00:00+00:00","event":"a.b"}',
        b'{"t":"9999-01-01T00:00:00+00:00","event":"a.b"}',
        b'{"t":"1970-01-01T00:00:00+14:00","event":"a.b"}',
        f'{{"t":"{FIRST}","event":"a.b","x":'.encode() + b"[" * 100_000,
        f'{{"t":"{FIRST}","event":"a.b","x":NaN}}'.encode(),
    ],
)
def test_what_is_no_line_of_the_log_is_none(raw: bytes) -> None:
    assert parse(raw) is None


@given(st.binary(max_size=200))
def test_no_bytes_are_an_error(raw: bytes) -> None:
    parse(raw)


def test_time_is_microseconds_and_utc_unless_it_says_otherwise() -> None:
    assert micros("1970-01-01T00:00:01.000002+00:00") == 1_000_002
    assert micros("1970-01-01T01:00:01.000002+01:00") == 1_000_002
    assert micros("1970-01-01T00:00:01.000002") == 1_000_002


def test_the_logs_of_all_processes_are_merged_by_time(tmp_path: Path) -> None:
    log_of(tmp_path, line(1, "a.a") + line(4, "a.b") + line(2, "a.c"))
    log_of(tmp_path, line(3, "b.a") + line(5, "b.b"), "events-1.jsonl")

    found = [(line.source, line.event) for line in merged(LogFile(path) for path in find_logs(tmp_path))]

    assert found == [(0, "a.a"), (1, "b.a"), (0, "a.b"), (0, "a.c"), (1, "b.b")]


def test_the_main_log_comes_first_and_nodes_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("events-10.jsonl", "events-9.jsonl", "events.jsonl", "events-head.jsonl", "metrics.jsonl"):
        log_of(tmp_path, b"", name)
    (tmp_path / "events-folder.jsonl").mkdir()

    names = [path.name for path in find_logs(tmp_path)]

    assert names == ["events.jsonl", "events-9.jsonl", "events-10.jsonl", "events-head.jsonl"]


def test_a_wrong_folder_is_said_in_one_line_that_helps(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    path = log_of(tmp_path / "first", line())

    with pytest.raises(RunDirError, match=r"there is no folder .*nowhere; give the folder of a run"):
        find_logs(tmp_path / "nowhere")
    with pytest.raises(RunDirError, match=r"events\.jsonl is a file; give the folder of the run: .*first"):
        find_logs(path)
    with pytest.raises(RunDirError, match=r"holds no log of a run.*; give one of the folders in it, such as .*first"):
        find_logs(tmp_path)
