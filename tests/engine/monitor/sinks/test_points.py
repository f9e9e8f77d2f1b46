"""What a sink is told of a line."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engine.monitor.sinks.points import Point, Points, describe
from engine.tracing import Event

AT = "2026-01-02T03:04:05.500000+00:00"
AT_S = 1767323045.5


def step_event(**fields: Any) -> Event:
    facts = {"step": 3, "version": 3, "loss": 0.5, "num_tokens": 30, "skipped": False, "ages": [1], "outcome": "ok"}
    return {"t": AT, "event": "learner.step", "level": "info", **facts, **fields}


def point(event: Event) -> Point:
    made = Points().point(event)
    assert made is not None
    return made


def test_a_step_gives_every_number_under_a_grouped_name() -> None:
    made = point(step_event(teacher_mass=0.75, note="a text", reward=2))

    assert (made.step, made.at_s) == (3, AT_S)
    assert made.values == {
        "train/loss": 0.5,
        "train/num_tokens": 30.0,
        "train/skipped": 0.0,
        "train/teacher_mass": 0.75,
        "train/reward": 2.0,
    }


def test_a_loss_that_is_no_number_is_told_as_it_is() -> None:
    assert math.isnan(point(step_event(loss=float("nan"))).values["train/loss"])


def test_a_measurement_is_told_at_the_version_that_was_measured() -> None:
    event = {"t": AT, "event": "eval.run", "level": "info", "outcome": "ok", "version": 0, "step": 0}
    made = point({**event, "num_prompts": 16, "num_tokens": 640, "kl": 1.5, "reference_kl": None, "score": 0.25})

    assert made.step == 0
    assert made.values == {"eval/num_prompts": 16.0, "eval/num_tokens": 640.0, "eval/kl": 1.5, "eval/score": 0.25}


@pytest.mark.parametrize(
    "event",
    [
        step_event(outcome="NonFiniteError"),
        {"t": AT, "event": "eval.run", "level": "info", "outcome": "CancelledError", "version": 3},
        {"t": AT, "event": "weights.live", "level": "info", "version": 3},
    ],
)
def test_work_that_failed_and_other_lines_measure_nothing(event: Event) -> None:
    assert Points().point(event) is None


def test_a_name_says_unit_and_reduction() -> None:
    assert describe("train/loss") == "nats per token, mean over tokens. The objective."
    assert describe("train/reward") == "unit not declared, mean over tokens."
