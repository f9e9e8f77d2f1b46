"""The file of held-out measurements survives a process that was killed while it wrote."""

from __future__ import annotations

from pathlib import Path

from engine.evaluations import Evaluation, append_evaluation, read_evaluations


def make_evaluation(version: int) -> Evaluation:
    return Evaluation(version=version, num_prompts=2, num_tokens=8, kl=0.5)


def test_what_is_appended_is_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.jsonl"
    assert read_evaluations(path) == []
    for version in (0, 5):
        append_evaluation(path, make_evaluation(version))

    assert read_evaluations(path) == [make_evaluation(0), make_evaluation(5)]


def test_a_torn_line_costs_itself_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.jsonl"
    append_evaluation(path, make_evaluation(0))
    with path.open("ab") as file:
        file.write(b'{"version": 5, "num_pro')
    assert read_evaluations(path) == [make_evaluation(0)]

    append_evaluation(path, make_evaluation(5))
    assert read_evaluations(path) == [make_evaluation(0), make_evaluation(5)]
