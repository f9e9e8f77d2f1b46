"""A run never waits for a sink, whatever the sink does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.monitor.sentences import sentence
from engine.monitor.sinks.feed import Feed
from engine.monitor.sinks.points import Point
from engine.tracing import Event, Tracing, span

PATIENCE_S = 30.0


class Notebook:
    """A sink that remembers, and can be held up or made to fail at each of its calls."""

    name = "notebook"

    def __init__(self, *, fails_at: str | None = None, error: BaseException | None = None) -> None:
        self.calls: list[str] = []
        self.steps: list[int] = []
        self.closed_ok: bool | None = None
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.is_held = threading.Event()
        self._fails_at = fails_at
        self._error = error or OSError("disk full")

    def open(self) -> str:
        self._do("open")
        return "/notebook"

    def write(self, point: Point) -> None:
        self._do("write")
        self.steps.append(point.step)

    def flush(self) -> None:
        self._do("flush")

    def close(self, *, ok: bool) -> None:
        self._do("close")
        self.closed_ok = ok

    def _do(self, call: str) -> None:
        self.calls.append(call)
        if not self.may_go_on.is_set():
            self.is_held.set()
            self.may_go_on.wait(PATIENCE_S)
        if call == self._fails_at:
            raise self._error


def step_event(step: int) -> Event:
    return {"t": "2026-01-02T03:04:05+00:00", "event": "learner.step", "level": "info", "step": step, "outcome": "ok"}


def steps(feed: Feed, *numbers: int) -> None:
    for number in numbers:
        feed.apply(step_event(number))


def finish(feed: Feed, *, ok: bool = True, timeout_s: float = PATIENCE_S) -> None:
    feed.end(ok=ok)
    feed.join(timeout_s)


@pytest.fixture
def tracing(tmp_path: Path) -> Iterator[Tracing]:
    with Tracing(level="info") as tracing:
        tracing.open(tmp_path, run="r", node="0")
        yield tracing


def said(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


@pytest.mark.usefixtures("tracing")
def test_every_point_arrives_in_order_and_the_last_ones_before_the_end(tmp_path: Path) -> None:
    sink = Notebook()
    feed = Feed(sink, max_points=100)
    feed.start()
    steps(feed, *range(1, 51))
    finish(feed)

    assert sink.steps == list(range(1, 51))
    assert (sink.calls[0], sink.calls[-2:], sink.closed_ok) == ("open", ["flush", "close"], True)
    assert [(line["sink"], line["where"]) for line in said(tmp_path, "sink.opened")] == [("notebook", "/notebook")]
    assert not said(tmp_path, "sink.dropped")


def test_the_log_itself_feeds_it(tmp_path: Path, tracing: Tracing) -> None:
    sink = Notebook()
    feed = Feed(sink, max_points=100)
    feed.start()
    tracing.subscribe("sink notebook", feed.apply)

    with span("learner.step", step=1, version=1) as facts:
        facts.add(loss=0.5)
    finish(feed)

    assert sink.steps == [1]


@pytest.mark.usefixtures("tracing")
def test_of_a_queue_that_is_full_the_oldest_go_and_that_is_said(tmp_path: Path) -> None:
    sink = Notebook()
    sink.may_go_on.clear()
    feed = Feed(sink, max_points=3)
    feed.start()
    assert sink.is_held.wait(PATIENCE_S)
    steps(feed, *range(1, 11))
    sink.may_go_on.set()
    finish(feed)

    assert sink.steps == [8, 9, 10]
    assert sum(line["num_dropped"] for line in said(tmp_path, "sink.dropped")) == 7
    assert {line["level"] for line in said(tmp_path, "sink.dropped")} == {"warning"}


@pytest.mark.usefixtures("tracing")
@pytest.mark.parametrize("call", ["open", "write", "flush", "close"])
@pytest.mark.parametrize("error", [OSError("disk full"), SystemExit(3)], ids=["error", "exit"])
def test_a_sink_that_fails_is_called_no_more_and_that_is_said_once(
    tmp_path: Path, call: str, error: BaseException
) -> None:
    sink = Notebook(fails_at=call, error=error)
    feed = Feed(sink, max_points=100)
    feed.start()
    steps(feed, 1, 2, 3)
    finish(feed)
    steps(feed, 4)

    assert sink.calls[-1] == call
    assert sink.calls.count(call) == 1
    (line,) = said(tmp_path, "sink.failed")
    assert (line["level"], line["sink"], line["error"]) == ("warning", "notebook", f"{type(error).__name__}: {error}")
    assert "in _do" in line["exception"]


@pytest.mark.usefixtures("tracing")
def test_the_end_of_a_run_does_not_wait_for_ever(tmp_path: Path) -> None:
    sink = Notebook()
    sink.may_go_on.clear()
    feed = Feed(sink, max_points=100)
    feed.start()
    assert sink.is_held.wait(PATIENCE_S)
    steps(feed, 1, 2)
    finish(feed, timeout_s=0.01)

    (line,) = said(tmp_path, "sink.failed")
    assert "2 points" in line["error"]
    sink.may_go_on.set()
    feed.join(PATIENCE_S)
    assert sink.steps == []
    assert len(said(tmp_path, "sink.failed")) == 1
    assert not said(tmp_path, "sink.opened"), "it came too late to be of use"


@pytest.mark.usefixtures("tracing")
def test_a_sink_hears_whether_the_run_failed() -> None:
    sink = Notebook()
    feed = Feed(sink, max_points=100)
    feed.start()
    finish(feed, ok=False)

    assert sink.closed_ok is False
    assert sink.steps == []


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (
            {"event": "sink.opened", "level": "info", "where": "/runs/first"},
            "notebook is told of this run: /runs/first",
        ),
        ({"event": "sink.dropped", "level": "warning", "num_dropped": 7}, "notebook is behind: 7 points were left out"),
        (
            {"event": "sink.failed", "level": "warning", "error": "OSError:\ndisk full"},
            "notebook is switched off: OSError: disk full; the run goes on",
        ),
    ],
)
def test_people_are_told(event: Event, text: str) -> None:
    assert sentence({"t": "2026-01-02T03:04:05+00:00", "sink": "notebook", **event}) == text
