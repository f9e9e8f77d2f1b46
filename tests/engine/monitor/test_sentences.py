"""Words for lines."""

from __future__ import annotations

from typing import Any

import pytest

from engine.monitor.sentences import printable, sentence, size, step_line
from tests.engine.monitor.story import Log, demo


def test_each_line_of_a_run_has_a_sentence_or_none_and_no_line_is_an_error() -> None:
    told = [text for line in demo(steps=30) if (text := sentence(line)) is not None]

    assert told[0] == ("run smollm2: 30 steps of 8 rollouts, at most 1 versions stale, in runs/smollm2-20260102-030405")
    assert told[-1].startswith("finished after step 30, ")
    assert "version 30, 16 held-out prompts: KL 0.588 nats/token, reference answers 0.733 nats/token" in told
    assert not [text for text in told if "\n" in text]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            {
                "event": "teacher.replica_changed",
                "level": "warning",
                "replica": "a:1",
                "state": "open",
                "reason": "5xx",
            },
            "teacher a:1 is away (5xx)",
        ),
        (
            {"event": "actor.failed", "level": "warning", "actor": "sampler", "error": "E()", "delay_s": 1.0},
            "sampler failed: E(); starting again in 1.0 s",
        ),
        (
            {"event": "actor.failed", "level": "error", "actor": "learner", "error": "E()", "is_final": True},
            "learner failed: E(); the run ends",
        ),
        (
            {"event": "log.message", "level": "warning", "logger": "transformers", "message": "a\nb"},
            "transformers: a b",
        ),
        ({"event": "log.message", "level": "info", "logger": "transformers", "message": "a"}, None),
        ({"event": "sampler.rollout", "level": "warning", "outcome": "X", "kind": "span", "dur_us": 1}, None),
        (
            {"event": "disk.slow", "level": "warning", "kind": "span", "outcome": "OSError", "dur_us": 1500},
            "disk.slow -> OSError (1.5 ms)",
        ),
        (
            {"event": "run.draining", "level": "warning", "signal": "SIGINT"},
            "SIGINT: nothing new, then a checkpoint; again: at once",
        ),
    ],
)
def test_sentence(line: dict[str, object], text: str | None) -> None:
    assert sentence({"t": "2026-01-02T03:04:05.000000+00:00", **line}) == text


def test_one_line_per_step() -> None:
    log = Log()
    log.step(3, loss=0.51234, ages=(0, 1))

    assert step_line(log.lines[0], steps=30, interval_s=3.0) == (
        "step 3/30  loss 0.5123 nats/token  grad norm 1.25  lr 0.0002  2 rollouts, 90 tokens  "
        "staleness 0.50 (max 1)  30 tokens/s  3.0 s"
    )
    assert "loss not finite" in step_line({**log.lines[0], "loss": None}, steps=None, interval_s=None)


def test_printable_keeps_letters_and_escapes_the_rest() -> None:
    assert printable("né\t→ \x1b[31m\u202e") == "né → \\x1b[31m\\u202e"


def test_size() -> None:
    assert [size(n) for n in (0, 999, 1_500, 1_357_000_000, 2.5e12)] == ["0 B", "999 B", "1.5 kB", "1.36 GB", "2.5 TB"]


@pytest.mark.parametrize(
    ("fields", "address"),
    [
        ({"host": "127.0.0.1", "port": 8080}, "http://127.0.0.1:8080/"),
        ({"host": "::1", "port": 8080, "has_token": False}, "http://[::1]:8080/"),
        ({"host": "10.0.0.5", "port": 80, "has_token": True}, "http://10.0.0.5:80/?token=… with the token of"),
    ],
)
def test_people_are_told_where_the_status_page_is(fields: dict[str, Any], address: str) -> None:
    assert f"status page on {address}" in (sentence(Log().line("node.listening", **fields)) or "")
