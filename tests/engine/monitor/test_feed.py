"""Readers of the status page: all at first, then what changed, never a queue."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.monitor.feed import MAX_LINES_A_TURN, Feed
from engine.monitor.snapshot import SECTIONS
from engine.tracing import Tracing
from tests.engine.monitor.story import Log, demo


@pytest.fixture
def tracing(tmp_path: Path) -> Iterator[Tracing]:
    with Tracing(level="info") as tracing:
        tracing.open(tmp_path, run="r1", node="0")
        yield tracing


def feed_of(lines: Any) -> Feed:
    feed = Feed()
    for line in lines:
        feed.put(line)
    while feed.take_in():
        pass
    return feed


def test_a_reader_gets_everything_and_then_only_what_changed() -> None:
    feed = feed_of(demo())
    reader = feed.reader()

    assert set(json.loads(reader.news())) == set(SECTIONS)
    assert reader.news() == b""

    feed.put(Log().at(500.0).line("teacher.retried", request_id="x"))
    feed.take_in()
    news = json.loads(reader.news())
    assert set(news) >= {"head", "teacher"}
    assert not {"curves", "answers", "weights"} & set(news)
    assert news["teacher"]["retries"] == 1


def test_lines_are_looked_at_when_there_is_time_for_it() -> None:
    feed = Feed()
    reader = feed.reader()
    reader.news()
    feed.put(Log().line("weights.live", version=3))

    assert reader.news() == b""
    feed.take_in()
    assert json.loads(reader.news())["weights"]["live"] == 3


def test_who_reads_seldom_gets_the_latest_and_no_more_than_that() -> None:
    feed = feed_of(demo(steps=2))
    often, seldom = feed.reader(), feed.reader()
    often.news(), seldom.news()
    log = Log()
    for step in range(3, 200):
        log.at(step).step(step)
        feed.put(log.lines[-1])
        feed.take_in()
        often.news()

    last = seldom.news()
    assert json.loads(last)["head"]["step"] == 199
    assert len(last) < 30_000


def test_a_new_reader_needs_nothing_of_what_others_got() -> None:
    feed = feed_of(demo())
    feed.reader().news()

    assert set(json.loads(feed.reader().news())) == set(SECTIONS)


def test_one_turn_takes_a_bounded_number_of_lines() -> None:
    feed = Feed()
    for number in range(MAX_LINES_A_TURN + 1):
        feed.put(Log().line("rollout.dispatched", rollout_id=number))

    assert feed.take_in()
    assert not feed.take_in()
    assert feed.view.totals["dispatched"] == MAX_LINES_A_TURN + 1


def test_a_line_with_other_fields_than_ours_is_left_out() -> None:
    log = Log()
    log.line("teacher.resumed", by="somebody else")
    log.line("eval.answer", prompt="x", version="one", answer="y", kl="small")
    log.line("weights.live", version=2)

    assert feed_of(log.lines).view.live_version == 2


def test_what_cannot_be_told_leaves_its_section_out_and_is_said_once(tmp_path: Path, tracing: Tracing) -> None:
    feed = feed_of([])
    feed.view.ages.update(["old", 1])  # type: ignore[list-item]
    reader = feed.reader()

    assert set(json.loads(reader.news())) == set(SECTIONS) - {"staleness"}
    feed.put(Log().line("weights.live", version=2))
    feed.take_in()
    assert json.loads(reader.news())["weights"]["live"] == 2
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [e["section"] for e in events if e["event"] == "monitor.section_left_out"] == ["staleness"]


def test_half_a_surrogate_pair_in_an_answer_is_replaced() -> None:
    log = Log()
    log.line("eval.answer", version=1, prompt="Hi \ud83d", answer="there", kl=0.1)
    news = json.loads(feed_of(log.lines).reader().news())

    assert news["answers"]["held_out"][0]["prompt"] == "Hi ?"


def test_news_is_one_line() -> None:
    log = Log()
    log.line("eval.answer", version=1, prompt="a\nb\r\nc\u2028d", answer="x\n\ndata: y", kl=0.1)
    text = feed_of(log.lines).reader().news()

    assert b"\n" not in text
    assert b"\r" not in text
