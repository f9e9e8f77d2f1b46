"""A resumed run's curves begin where the run began."""

from __future__ import annotations

import json
from pathlib import Path

from engine.evaluations import Answer, Evaluation, append_evaluation
from engine.monitor.earlier import remember
from engine.monitor.view import RunView
from engine.run_dir import RunDir
from engine.step_log import StepLog
from tests.engine.monitor.story import Log


def evaluation(version: int, kl: float) -> Evaluation:
    answer = Answer(prompt="Why?", answer=f"because {version}", kl=kl)
    return Evaluation(version=version, num_prompts=4, num_tokens=40, kl=kl, answers=(answer,))


def test_steps_and_measurements_up_to_the_checkpoint_and_not_what_is_done_again(tmp_path: Path) -> None:
    run_dir, log = RunDir(tmp_path), Log()
    rows = StepLog(run_dir.metrics)
    for step, loss in ((1, 3.0), (2, 2.0), (3, 1.0), (2, 2.5), (3, 1.5), (4, 9.0)):  # resumed once before
        log.at(log.now_s + 2.0).step(step, loss=loss)
        rows.apply(log.lines[-1])
    for version, kl in ((0, 1.0), (2, 0.8), (2, 0.7), (4, 0.1)):
        append_evaluation(run_dir.evaluations, evaluation(version, kl))
    view = RunView()
    remember(view, run_dir, until=3)

    assert view.loss_curve.points() == [(1, 3.0), (2, 2.5), (3, 1.5)]
    assert view.trained_curve.points()[1:] == [(2, 45.0), (3, 45.0)]
    assert [(held.version, held.kl) for held in view.evaluations] == [(0, 1.0), (2, 0.7)]
    assert view.answers["Why?"].answer == "because 2"


def test_a_folder_in_which_nothing_was_measured(tmp_path: Path) -> None:
    view = RunView()
    remember(view, RunDir(tmp_path), until=3)

    assert view.loss_curve.points() == []
    assert view.evaluations == []


def test_torn_and_foreign_lines_are_left_out(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.metrics.write_bytes(
        b'{"step":1,"loss":2.0}\n\n{"step":"two"}\n\xff\xfe\n[]\n'
        + json.dumps({"step": 3}).encode()
        + b'\n{"step":4,"lo'
    )
    view = RunView()
    remember(view, run_dir, until=9)

    assert view.loss_curve.points() == [(1, 2.0), (3, None)]
