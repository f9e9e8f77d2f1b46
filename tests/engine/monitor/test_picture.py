"""The picture fits its terminal, whatever the run does."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from engine.monitor.picture import ASCII, UNICODE, Glyphs, Picture, bar, clock, lines, sparkline
from engine.monitor.view import RunView, Shares
from tests.engine.monitor.story import Log, demo


def make_view(*, steps: int = 12) -> RunView:
    view = RunView()
    for line in demo(steps=steps):
        view.apply(line)
    return view


def drawn(view: RunView, *, width: int = 80, height: int = 24, glyphs: Glyphs = UNICODE) -> str:
    found = lines(view, now=view.now, width=width, height=height, glyphs=glyphs)
    return "\n".join(line.plain for line in found)


@pytest.mark.parametrize("width", [60, 80, 100, 120, 140])
@pytest.mark.parametrize("height", [4, 16, 23, 40])
@pytest.mark.parametrize("steps", [0, 1, 12, 30])
def test_no_line_is_too_wide_and_there_are_not_too_many(width: int, height: int, steps: int) -> None:
    view = make_view(steps=steps) if steps else RunView()
    found = lines(view, now=view.now + 1, width=width, height=height)

    assert len(found) <= height
    assert max(line.cell_len for line in found) <= width


def test_at_80_columns_nothing_of_the_demo_is_cut_off() -> None:
    view = make_view()
    view.notices.clear()  # paths may be longer than any line
    text = drawn(view)

    assert "…" not in text
    assert "held-out KL 1.331 nats/token   references 1.204   version 0" in text
    assert "16 sampling   0 at teacher   0 scored   0 in step   96 trained" in text


def test_who_waits_for_whom_is_said_in_words() -> None:
    rows = {row.split()[0]: row for row in drawn(make_view()).splitlines() if row}

    assert "room at sampler" in rows["prompt_feeder"]
    assert rows["learner"].split()[3] == "teacher_proxy"
    assert rows["prompt_feeder"].endswith("1/2")


def test_what_matters_most_is_the_last_to_give_way() -> None:
    small = drawn(make_view(), height=14)

    assert "step 12/30" in small
    assert "weight_syncer" in small
    assert "last answer" not in small


def test_a_parked_run_says_so_at_the_top_and_for_how_long() -> None:
    view = make_view()
    log = Log()
    log.at(200).line("teacher.replica_changed", level="warning", replica="b:1", state="open", reason="refused")
    log.line("teacher.parked", level="warning", num_parked=3)
    log.at(212).line("loop.lag", lag_s=0.0)
    for line in log.lines:
        view.apply(line)

    text = drawn(view)
    assert "waiting for the teacher" in text.splitlines()[0]
    assert "b:1 away" in text
    assert "away for 12 s" in text


def test_an_answer_cannot_move_the_cursor() -> None:
    view = RunView()
    log = Log()
    log.line("eval.answer", version=1, prompt="Hi\x1b[2J", answer="a\r\nb\x07", kl=0.1)
    view.apply(log.lines[0])

    text = drawn(view)
    assert "\x1b" not in text
    assert "Hi\\x1b[2J" in text
    assert "a  b\\x07" in text


def test_a_terminal_without_unicode_gets_ascii() -> None:
    view = make_view()
    view.notices.clear()

    assert drawn(view, glyphs=ASCII).isascii()


def test_a_console_draws_it() -> None:
    out = io.StringIO()
    console = Console(file=out, width=80, height=24, force_terminal=True, color_system="standard")
    console.print(Picture(make_view(), now=0.0, height=23))

    assert out.getvalue().count("\n") <= 23
    assert "\x1b[36mloss" in out.getvalue()


def test_of_many_notices_of_one_kind_only_the_newest_takes_room() -> None:
    view = RunView()
    log = Log()
    log.line("teacher.resumed", parked_s=3.0)
    for step in range(1, 9):
        log.line("checkpoint.saved", step=step, path="p", num_bytes=1000)
    for line in log.lines:
        view.apply(line)

    assert [line[12:] for line in drawn(view).splitlines() if "04:05 " in line] == [
        "a teacher is back after 3.0 s",
        "checkpoint of step 8 in p (1 kB)",
    ]


def test_many_replicas_are_counted_and_only_the_absent_ones_named() -> None:
    view = RunView()
    log = Log()
    for n in range(8):
        log.line("teacher.replica_changed", replica=f"t{n}:80", state="open" if n == 3 else "closed", reason="")
    for line in log.lines:
        view.apply(line)

    assert "7 of 8 replicas up   t3:80 away" in drawn(view)


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([], 10, ""),
        ([1.0], 10, "▄"),
        ([1.0, 1.0], 10, "▄▄"),
        ([8.0, None, 1.0], 10, "█ ▁"),
        ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 10, "▁▂▃▄▅▆▇█"),
        ([0.0, 2.0, 6.0, 8.0], 2, "▁█"),
        ([None, None], 10, "  "),
        ([1.0], 0, ""),
    ],
)
def test_sparkline(values: list[float | None], width: int, expected: str) -> None:
    assert sparkline(values, width) == expected


def test_a_bar_is_exactly_as_wide_as_asked() -> None:
    for worked in range(0, 101, 7):
        for room in range(0, 101 - worked, 9):
            shares = Shares(worked=worked / 100, waited_room=room / 100, waited_input=1 - worked / 100 - room / 100)
            assert bar(shares, 13).cell_len == 13


def test_clock() -> None:
    assert [clock(seconds) for seconds in (0, 102.9, 7302)] == ["0:00", "1:42", "2:01:42"]
