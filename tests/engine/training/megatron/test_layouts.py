"""However a student is cut into pieces, it computes what transformers computes and learns what one process learns. Real
ranks under gloo."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from engine.objective_config import ObjectiveConfig
from engine.recipe import StudentConfig
from engine.training.hf import HFTrainer
from engine.training.rank_work import RankRollout
from engine.types import StepReport
from tests.engine.training.megatron.rank_cases import (
    LEARNER,
    NUM_STEPS,
    ON_RANKS,
    Steps,
    as_scored,
    make_rollouts,
    num_ranks,
    settings,
    whole_gradients,
)
from tests.engine.training.megatron.students import STUDENTS, make_student
from tests.support.models import load, plain_logits
from tests.support.worlds import Worlds

ONE: dict[str, Any] = {}
BOTH: dict[str, dict[str, Any]] = {
    "DP2": {"data_parallel": 2},
    "TP2 SP": {"tensor_parallel": 2},
    "PP2": {"pipeline_parallel": 2},
    "PP3": {"pipeline_parallel": 3, "first_stage_layers": 1, "last_stage_layers": 1},
    "CP2": {"context_parallel": 2},
    "TP2 SP PP2": {"tensor_parallel": 2, "pipeline_parallel": 2},
}
DENSE: dict[str, dict[str, Any]] = {
    **BOTH,
    "TP2": {"tensor_parallel": 2, "sequence_parallel": False},
    "TP2 PP2": {"tensor_parallel": 2, "sequence_parallel": False, "pipeline_parallel": 2},
    "TP2 CP2": {"tensor_parallel": 2, "sequence_parallel": False, "context_parallel": 2},
}
EXPERTS: dict[str, dict[str, Any]] = {
    **BOTH,
    "EP2": {"data_parallel": 2, "expert_parallel": 2},
    "EP2 PP2": {"data_parallel": 2, "expert_parallel": 2, "pipeline_parallel": 2},
    "TP2 SP EP2 PP2": {"tensor_parallel": 2, "expert_parallel": 2, "pipeline_parallel": 2},
    "TP2 SP CP2 EP2": {"tensor_parallel": 2, "context_parallel": 2, "expert_parallel": 2},
}
CASES = [("qwen3", name) for name in DENSE] + [("moonlight", name) for name in EXPERTS]

Rollouts = Sequence[RankRollout]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_student(name, tmp_path_factory.mktemp("student")) for name in STUDENTS}


@lru_cache
def steps_of(name: str) -> list[list[Rollouts]]:
    """Three steps of two calls each; one call has fewer rollouts than there are ranks and passes."""
    vocab_size = STUDENTS[name].vocab_size
    return [
        [make_rollouts(num, vocab_size=vocab_size, seed=2 * step + call) for call, num in enumerate((5, 3))]
        for step in range(3)
    ]


def train(worlds: Worlds, folder: Path, layout: dict[str, Any], steps: Any) -> list[Steps]:
    return worlds.run(f"{ON_RANKS}:train", num_ranks(layout), settings(folder, layout), steps)


def step_reports(seen: Sequence[Steps]) -> list[StepReport]:
    """Rank 0's."""
    assert all(not one.steps for one in seen[1:])
    return seen[0].steps


@pytest.fixture(scope="module")
def by_one(folders: dict[str, Path], worlds: Worlds) -> dict[str, list[Steps]]:
    """What one process does."""
    return {name: train(worlds, folders[name], ONE, steps_of(name)) for name in ("qwen3", "moonlight")}


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_steps_are_those_of_one_process(
    name: str, layout: str, folders: dict[str, Path], worlds: Worlds, by_one: dict[str, list[Steps]]
) -> None:
    """Loss, gradient norm and every parameter's gradient, over three steps."""
    seen = train(worlds, folders[name], (DENSE | EXPERTS)[layout], steps_of(name))

    for step, (found, expected) in enumerate(zip(step_reports(seen), step_reports(by_one[name]), strict=True)):
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
        assert (found.num_rollouts, found.num_tokens) == (expected.num_rollouts, expected.num_tokens)
        assert found.metrics["student_logprob"] == pytest.approx(expected.metrics["student_logprob"], rel=1e-5)
        ours, theirs = whole_gradients(seen, step), whole_gradients(by_one[name], step)
        assert ours.keys() == theirs.keys()
        off = {key: float((ours[key] - theirs[key]).norm() / theirs[key].norm()) for key in theirs}
        assert max(off.values()) <= 1e-5, f"step {step + 1}: {max(off, key=off.__getitem__)}"
    told = {index: loss for one in seen for report in one.reports for index, loss in _losses(report)}
    expected_told = {index: loss for report in by_one[name][0].reports for index, loss in _losses(report)}
    assert told == pytest.approx(expected_told, rel=1e-4)


def _losses(report: Any) -> list[tuple[int, float]]:
    return list(zip(report.indices, report.loss_sums, strict=True))


@pytest.mark.parametrize("layout", ["1", *(DENSE | EXPERTS)])
def test_logits_are_those_of_transformers(layout: str, folders: dict[str, Path], worlds: Worlds) -> None:
    sequences = [np.random.default_rng(i).integers(3, 60, 3 + 7 * i).tolist() for i in range(3)]
    for name in STUDENTS if layout == "1" else ("qwen3", "moonlight"):
        cut = (EXPERTS if name == "moonlight" else DENSE).get(layout, ONE)
        if cut is ONE and layout != "1":
            continue
        known = worlds.run(f"{ON_RANKS}:logits", num_ranks(cut), settings(folders[name], cut), sequences)
        model = load(folders[name])
        for number, ids in enumerate(sequences):
            expected = plain_logits(model, ids)
            found = torch.full_like(expected, float("nan"))
            for here, rows in (one[number] for one in known if one):
                found[here] = rows
            # Of the largest logit: a float32 sum of this length is off by that much in any order.
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize(
    ("name", "layout"), [("qwen3", "TP2 SP"), ("qwen3", "TP2"), ("llama", "TP2 SP"), ("llama, untied", "TP2")]
)
def test_steps_of_a_dense_student_are_those_of_the_torch_trainer(
    name: str, layout: str, folders: dict[str, Path], worlds: Worlds
) -> None:
    steps = steps_of(name)
    found = step_reports(train(worlds, folders[name], DENSE[layout], steps))
    torch_trainer = HFTrainer(
        config=msgspec.structs.replace(LEARNER, backend="hf"),
        student=StudentConfig(path=str(folders[name])),
        objective=ObjectiveConfig(),
        steps=NUM_STEPS,
    )
    torch_trainer.start()
    for calls, ours in zip(steps, found, strict=True):
        for rollouts in calls:
            torch_trainer.accumulate([as_scored(rollout) for rollout in rollouts])
        theirs = torch_trainer.finish_step()

        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
        assert ours.lr == theirs.lr
        for metric, value in theirs.metrics.items():
            assert ours.metrics[metric] == pytest.approx(value, rel=1e-5, abs=1e-7), metric
