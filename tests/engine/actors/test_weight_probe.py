"""A generator that computes with other weights than the learner is found out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from engine.actor import Worker
from engine.actors.weight_probe import WeightProbe
from engine.errors import WeightsMismatch
from engine.objective_config import ObjectiveConfig
from engine.recipe import LearnerConfig, StudentConfig
from engine.training.hf import HFTrainer
from tests.support.models import load, plain_logits, tiny_model

IDS = (5, 9, 2, 40)


class Generator:
    def __init__(self, values: list[float]) -> None:
        self._values = values

    async def score(self, token_ids: tuple[int, ...]) -> list[float]:
        return self._values


def probe(found: list[float], *, every: int = 1, bound: float = 0.01) -> WeightProbe:
    return WeightProbe(
        generator=Generator(found),
        learner=lambda ids: [-1.0, -2.0, -3.0],
        worker=Worker("learner"),
        token_ids=IDS,
        every=every,
        bound=bound,
    )


async def test_only_every_nth_version_is_compared() -> None:
    asked = probe([], every=3)

    assert [await asked.expect(version) is not None for version in range(1, 7)] == [False, False, True] * 2


async def test_what_rounding_does_passes() -> None:
    asked = probe([-1.009, -1.991, -3.0])

    await asked.verify(1, await asked.expect(1) or ())


@pytest.mark.parametrize("wrong", [-2.02, math.nan, -math.inf])
async def test_a_difference_beyond_the_bound_names_both_numbers_and_the_setting(wrong: float) -> None:
    asked = probe([-1.0, wrong, -3.0])

    expected = await asked.expect(7) or ()
    both = rf"version 7: token 2 .* {wrong:.6f} in the sampler and -2\.000000 in the learner; .*verify_bound=0\.01"
    with pytest.raises(WeightsMismatch, match=both):
        await asked.verify(7, expected)


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_the_learner_scores_as_a_plain_forward_pass_does(tmp_path: Path, packing: str) -> None:
    folder = tiny_model(tmp_path)
    trainer = HFTrainer(
        config=LearnerConfig(packing=packing),  # type: ignore[arg-type]
        student=StudentConfig(path=str(folder)),
        objective=ObjectiveConfig(),
        steps=1,
    )
    trainer.start()

    found = trainer.score(IDS)

    expected = plain_logits(load(folder), IDS)[:-1].double().log_softmax(-1)
    assert found == pytest.approx([float(expected[t, token]) for t, token in enumerate(IDS[1:])], abs=1e-5)
    assert all(
        parameter.grad is None or not parameter.grad.any() for parameter in trainer._loaded.student.model.parameters()
    )
