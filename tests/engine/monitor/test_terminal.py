"""What a terminal, and what no terminal, gets to see."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from engine.monitor.terminal import RunConsole, Terminal
from engine.tracing import Tracing, log, span

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def tracing(tmp_path: Path) -> Iterator[Tracing]:
    with Tracing(level="info") as tracing:
        tracing.open(tmp_path, run="r1", node="0")
        yield tracing


def make_console(*, live: bool = False) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=80, height=24, force_terminal=live, color_system=None), out


def emit_step(step: int) -> None:
    with span("learner.step", step=step, version=step) as facts:
        facts.add(
            loss=0.5,
            grad_norm=1.0,
            lr=1e-4,
            num_rollouts=2,
            num_tokens=30,
            num_micro_batches=1,
            staleness_max=1,
            staleness_mean=0.5,
            ages=[0, 1],
        )


def test_without_a_terminal_each_step_and_each_notable_event_is_one_plain_line(tracing: Tracing) -> None:
    console, out = make_console()
    with Terminal(tracing, live=False, console=console) as terminal:
        log.info("rollout.dispatched", rollout_id=1)
        emit_step(1)
        log.warning("teacher.parked", num_parked=2)
        log.info("teacher.resumed", parked_s=1.5)

    assert [line[9:] for line in out.getvalue().splitlines()] == [
        "step 1  loss 0.5 nats/token  grad norm 1  lr 0.0001  2 rollouts, 30 tokens  staleness 0.50 (max 1)",
        "WARNING every teacher is away: 2 rollouts wait for one",
        "a teacher is back after 1.5 s",
    ]
    assert terminal.view.step == 1


def test_plain_lines_are_never_folded(tracing: Tracing) -> None:
    console, out = make_console()
    with Terminal(tracing, live=False, console=console):
        log.warning("log.message", logger="x", message="word " * 60)

    assert len(out.getvalue().splitlines()) == 1


def test_the_view_is_complete_after_the_end(tracing: Tracing) -> None:
    console, _ = make_console(live=True)
    with Terminal(tracing, live=True, console=console) as terminal:
        for step in range(1, 201):
            emit_step(step)

    assert terminal.view.step == 200
    assert terminal.view.totals["trained"] == 400


def test_a_live_picture_is_cleared_at_a_good_end_and_stays_after_a_failure(tracing: Tracing) -> None:
    console, out = make_console(live=True)
    with Terminal(tracing, live=True, console=console):
        emit_step(7)
    cleared = out.getvalue()
    console, out = make_console(live=True)

    def fail() -> None:
        with Terminal(tracing, live=True, console=console):
            emit_step(8)
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        fail()

    assert "step 7" in cleared
    assert cleared.rstrip().endswith("\x1b[2K"), "the last thing done is erasing"
    assert not out.getvalue().rstrip().endswith("\x1b[2K")


def test_a_line_with_other_fields_than_ours_is_left_out_and_said_once(tmp_path: Path, tracing: Tracing) -> None:
    console, out = make_console()
    with Terminal(tracing, live=False, console=console):
        log.info("teacher.resumed", by="somebody else")
        log.info("teacher.resumed", by="somebody else")
        emit_step(1)

    assert "step 1" in out.getvalue()
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [line["line"] for line in events if line["event"] == "monitor.line_ignored"] == ["teacher.resumed"]


class Stuck(io.StringIO):
    """A terminal after Ctrl-S."""

    def __init__(self) -> None:
        super().__init__()
        self.is_reached = threading.Event()
        self.goes_on = threading.Event()

    def write(self, text: str) -> int:
        self.is_reached.set()
        self.goes_on.wait()
        return len(text)


def test_a_terminal_that_stands_still_does_not_hold_up_who_logs(tracing: Tracing) -> None:
    stuck = Stuck()
    with Terminal(tracing, live=False, console=Console(file=stuck)) as terminal:
        emit_step(1)
        assert stuck.is_reached.wait(10.0)
        emit_step(2)  # returns, although nothing is taken
        stuck.goes_on.set()

    assert terminal.view.step == 2


class Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_terminal_that_is_gone_ends_the_picture_and_not_the_run(tmp_path: Path, tracing: Tracing) -> None:
    with Terminal(tracing, live=False, console=RunConsole(file=Gone())):
        emit_step(1)
    emit_step(2)

    events = [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert events[1:] == ["learner.step", "monitor.ended", "learner.step"]


def test_a_summary_that_nobody_reads_is_no_failure(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys\n"
        "from engine.monitor.summary import Summary\n"
        "from engine.monitor.terminal import Terminal\n"
        "from engine.tracing import Tracing\n"
        "with Tracing() as tracing:\n"
        "    tracing.open(pathlib.Path(sys.argv[1]), run='r', node='0')\n"
        "    sys.stdin.read()\n"
        "    terminal = Terminal(tracing, live=False)\n"
        "    terminal.show(Summary(run='r', out='o', step=1, steps=1, stopped_by=None, wall_s=1.0))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, stderr = process.communicate()

    assert (process.returncode, stderr) == (0, b"")
    assert '"summary.not_shown"' in (tmp_path / "events.jsonl").read_text()
