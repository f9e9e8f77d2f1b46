"""From the line of an optimizer step to the line of ``metrics.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from engine.metric_catalogue import STEP_METRICS
from engine.step_log import StepLog
from engine.tracing import Tracing, log
from tests.support.log_lines import event, step_event

DECLARED = [metric.name for metric in STEP_METRICS]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_optimizer_step_is_one_line_with_declared_names_first(tmp_path: Path) -> None:
    steps = StepLog(tmp_path / "metrics.jsonl")
    steps.apply(step_event(1, teacher_mass=0.97, rollout_ids=[4, 5]))
    steps.apply({**step_event(2), "t": "2026-01-02T03:04:07.500000+00:00"})
    steps.apply(step_event(3, outcome="NonFiniteError"))
    steps.apply(event("weights.live", version=2))

    one, two = lines(tmp_path / "metrics.jsonl")
    assert (one["step"], two["step"]) == (1, 2)
    assert list(one) == [*DECLARED, "teacher_mass"]
    assert (one["interval_s"], two["interval_s"]) == (None, 2.5)


def test_a_step_whose_loss_is_no_number_has_a_line(tmp_path: Path) -> None:
    StepLog(tmp_path / "metrics.jsonl").apply(step_event(loss=float("nan"), skipped=True))

    (line,) = lines(tmp_path / "metrics.jsonl")
    assert (line["loss"], line["skipped"]) == (None, True)


def test_a_trainer_of_yours_may_measure_what_it_likes_and_in_what_it_likes(tmp_path: Path) -> None:
    StepLog(tmp_path / "metrics.jsonl").apply(
        step_event(reward=np.float64(0.5), num_tools=np.int32(3), judge=np.array(2.0), odd={"a": 1})
    )

    (line,) = lines(tmp_path / "metrics.jsonl")
    assert (line["reward"], line["num_tools"], line["judge"], line["odd"]) == (0.5, 3, 2.0, "{'a': 1}")


def test_a_line_that_a_kill_tore_is_ended_before_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n{"step":2,"lo')
    StepLog(path).apply(step_event(2))

    whole, torn, again = path.read_text().splitlines()
    assert (whole, torn) == ('{"step":1}', '{"step":2,"lo')
    assert json.loads(again)["step"] == 2


def test_fed_by_the_log_itself(tmp_path: Path) -> None:
    with Tracing() as tracing:
        tracing.open(tmp_path, run="r", node="0")
        tracing.subscribe("metrics.jsonl", StepLog(tmp_path / "metrics.jsonl").apply)
        log.info("weights.live", version=1)

    assert not (tmp_path / "metrics.jsonl").exists(), "no step, no line"
