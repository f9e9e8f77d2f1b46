"""What a recipe may say of its objective."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import RecipeError
from engine.objective_config import ObjectiveConfig, TermConfig
from engine.recipe import DataConfig, LocalTeacher, Recipe, StudentConfig, with_overrides


def recipe() -> Recipe:
    return Recipe(
        name="r",
        steps=1,
        student=StudentConfig(path="student"),
        teacher=LocalTeacher(model="teacher"),
        data=DataConfig(path="prompts.jsonl", reference_column="answer"),
    )


def test_kind_and_its_fields_can_be_set_one_by_one_or_whole() -> None:
    one_by_one = with_overrides(recipe(), ["objective.kind=jsd", "objective.beta=0.3"])
    whole = with_overrides(recipe(), ['objective={"kind":"jsd","beta":0.3}'])

    assert one_by_one.objective == whole.objective == ObjectiveConfig(kind="jsd", beta=0.3)


def test_a_mixture_is_a_list_of_weighted_terms() -> None:
    terms = '[{"kind":"jsd","weight":0.5},{"kind":"student_topk_reverse_kl","k":8,"weight":2}]'

    objective = with_overrides(recipe(), ["objective.kind=mixture", f"objective.terms={terms}"]).objective

    assert objective.terms == (
        TermConfig(kind="jsd", weight=0.5),
        TermConfig(kind="student_topk_reverse_kl", k=8, weight=2.0),
    )
    assert objective.num_top_ids == 8


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["objective.alpha=0.2"], r"alpha=0\.2 belongs to kind='skew_kl', this one is 'forward_kl'"),
        (["objective.kind=mixture"], r"kind='mixture' with 0 terms"),
        (['objective.terms=[{"weight":1}]'], r"kind='forward_kl' with 1 terms"),
        (["objective.kind=mixture", 'objective.terms=[{"kind":"mixture","weight":1}]'], "a mixture in a mixture"),
        (["objective.kind=mixture", 'objective.terms=[{"weight":0}]'], "all weights are 0"),
        (["objective.kind=sampled_reverse_kl", "objective.tail=ignore"], r"tail='ignore' has no meaning"),
        (["objective.beta=1.5", "objective.kind=jsd"], r"`float` <= 1\.0 - at `\$\.objective\.beta`"),
        (
            ["objective.kind=mixture", 'objective.terms=[{"kind":"kl","weight":1}]'],
            r"`\$\.objective\.terms\[0\]\.kind`; expected one of 'forward_kl', ",
        ),
        (["objective.temperature=0"], r"`float` > 0\.0 - at `\$\.objective\.temperature`"),
        (
            ["objective.kind=sampled_reverse_kl", "data.reference_share=0.5"],
            r"data\.reference_share=0\.5 trains on completions that the student has not sampled",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused(assignments: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        with_overrides(recipe(), assignments)


@pytest.mark.parametrize(
    ("objective", "num_top_ids"),
    [
        ({"kind": "student_topk_reverse_kl"}, 64),
        ({"kind": "student_topk_reverse_kl", "k": 3}, 3),
        ({"kind": "reverse_kl"}, 0),
    ],
)
def test_only_the_students_top_k_asks_the_teacher_for_more(objective: Any, num_top_ids: int) -> None:
    assert ObjectiveConfig(**objective).num_top_ids == num_top_ids
