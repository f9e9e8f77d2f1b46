"""``python -m engine.trace``: where the trace goes, and what is said when it cannot."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine import trace
from tests.support.traces import Trace

ROOT = Path(__file__).resolve().parents[3]
OPENED = {"t": "2026-01-02T03:04:05.000001+00:00", "event": "log.opened", "level": "info", "node": "0", "start_ns": 5}
STEP = {
    "t": "2026-01-02T03:04:07.000001+00:00",
    "event": "learner.step",
    "level": "info",
    "node": "0",
    "kind": "span",
    "actor": "learner",
    "step": 1,
    "loss": 0.5,
    "outcome": "ok",
    "start_ns": 1_000_000_005,
    "dur_us": 1_000_000,
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (OPENED, STEP)))
    return folder


def main(*arguments: object) -> int:
    return trace.main([str(argument) for argument in arguments])


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_it_writes_the_trace_and_says_what_it_is_and_how_to_open_it(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "trace.json"

    assert main(run_dir, "-o", out) == 0

    said = capsys.readouterr()
    assert said.out == f"wrote {out}: 1 span, 0 rollouts, 1 process, 2 s; open it at https://ui.perfetto.dev\n"
    assert said.err == ""
    assert len(Trace.read(out).slices) == 1
    assert leftovers(tmp_path) == []


def test_without_an_option_it_goes_into_the_folder_of_the_run_and_replaces_an_older_one(run_dir: Path) -> None:
    (run_dir / "trace.json").write_text("old")

    assert main(run_dir) == 0

    Trace.read(run_dir / "trace.json")


def test_a_name_in_gz_is_compressed(run_dir: Path, tmp_path: Path) -> None:
    assert main(run_dir, "-o", tmp_path / "trace.json.gz") == 0

    Trace(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))


def test_a_dash_is_the_standard_output_and_the_words_go_elsewhere(
    run_dir: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert main(run_dir, "-o", "-") == 0

    said = capsysbinary.readouterr()
    Trace(said.out)
    assert said.err.startswith(b"wrote -: 1 span,")


def test_what_is_left_out_is_said_and_no_failure(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (run_dir / "events.jsonl").open("ab") as log:
        log.write(b"{broken\n\x00\x00\n" + json.dumps(STEP).encode()[:30])

    assert main(run_dir) == 0

    path = run_dir / "events.jsonl"
    assert capsys.readouterr().err.splitlines() == [
        f"{path}: 2 of 5 lines are not JSON of the log's form and left out (the first is line 3)",
        f"{path}: the last line is not complete and left out; the run goes on, or was killed",
    ]


def test_an_empty_log_is_an_empty_trace(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "events.jsonl").write_bytes(b"")

    assert main(run_dir) == 0

    assert "the log holds no events yet" in capsys.readouterr().out
    assert Trace.read(run_dir / "trace.json").events == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no folder nowhere; give the folder of a run"),
        (["run/events.jsonl"], "run/events.jsonl is a file; give the folder of the run: run"),
        (["."], ". holds no log of a run, expected events.jsonl in it; give one of the folders in it, such as run"),
        (["empty"], "empty holds no log of a run, expected events.jsonl in it"),
        (["run", "-o", "run"], "Is a directory; name a file in a writable folder"),
        (["run", "-o", "nowhere/trace.json"], "No such file or directory; name a file in a writable folder"),
        (["run", "-o", "run/events.jsonl/x"], "Not a directory; name a file in a writable folder"),
        (["run", "-o", "run/events.jsonl"], "run/events.jsonl is the log itself; name another file with -o"),
        (["run", "-o", "x" * 300], "File name too long; name a file in a writable folder"),
        (["run", "-o", "/dev/full"], "No space left on device; name a file in a writable folder"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(run_dir.parent)
    (run_dir.parent / "empty").mkdir()
    before = (run_dir / "events.jsonl").read_bytes()

    assert main(*arguments) == 2

    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert message in said.err
    assert (run_dir / "events.jsonl").read_bytes() == before
    assert leftovers(run_dir) == leftovers(run_dir.parent) == []


def test_a_folder_that_is_read_only_is_one_line(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    tmp_path.chmod(0o500)
    try:
        assert main(run_dir, "-o", tmp_path / "trace.json") == 2
    finally:
        tmp_path.chmod(0o700)

    assert "Permission denied" in capsys.readouterr().err


def test_a_link_is_followed_and_stays(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")

    assert main(run_dir, "-o", tmp_path / "link.json") == 0

    assert (tmp_path / "link.json").is_symlink()
    Trace.read(tmp_path / "real.json")


def test_a_device_is_written_to_and_not_replaced(run_dir: Path) -> None:
    assert main(run_dir, "-o", os.devnull) == 0

    assert Path(os.devnull).is_char_device()


def test_a_reader_that_goes_away_is_no_traceback(run_dir: Path) -> None:
    with (run_dir / "events.jsonl").open("a") as log:
        log.writelines(json.dumps(STEP) + "\n" for _ in range(5000))
    process = subprocess.Popen(
        [sys.executable, "-m", "engine.trace", str(run_dir), "-o", "-"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout, process.stderr:
        process.stdout.read(10)
        process.stdout.close()
        stderr = process.stderr.read()

    assert process.wait() == 141
    assert stderr == b""


def test_a_signal_leaves_nothing_behind(run_dir: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "events"
    os.mkfifo(pipe)
    target = tmp_path / "out"
    target.mkdir()
    # A log that never ends: a regular file to begin with, and the process reads from a pipe in its place.
    program = (
        "import signal, sys\nfrom engine import trace\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "whole = trace.merged\n"
        f"def merged(files):\n    yield from whole(files)\n    open({str(pipe)!r}, 'w').close()\n    signal.pause()\n"
        "trace.merged = merged\n"
        f"sys.exit(trace.main([{str(run_dir)!r}, '-o', {str(target / 'trace.json')!r}]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE)
    with pipe.open():  # the process has read its log
        process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()

    assert process.returncode == 130
    assert stderr == b"stopped; no trace was written\n"
    assert list(target.iterdir()) == []
