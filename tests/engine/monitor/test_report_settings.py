"""A recipe beside its defaults."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.monitor.report.settings import NO_DEFAULT, UNKNOWN, Setting, settings
from engine.recipe import describe
from recipes import smollm2


def changed(recipe: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {s.path: (s.value, s.default) for s in settings(recipe) if not s.is_default}


def demo_recipe() -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(describe(smollm2.recipe()))
    return tree


def test_only_what_somebody_set_differs() -> None:
    found = changed(demo_recipe())

    assert found["learner.lr"] == ("0.0003", "0.00001")
    assert found["max_staleness"] == (str(demo_recipe()["max_staleness"]), "1")
    assert found["student.path"] == ("models/smollm2/student", NO_DEFAULT)
    assert found["teacher.kind"] == ("http", NO_DEFAULT)
    assert found["teacher.top_k"] == ("256", "64")
    assert found["evaluation.data.reference_column"] == ("teacher_answer", "null")
    assert not {"seed", "learner.betas", "teacher.deadline_s", "evaluation.num_shown", "objective.kind"} & set(found)


def test_every_leaf_is_there_once() -> None:
    paths = [s.path for s in settings(demo_recipe())]

    assert len(paths) == len(set(paths))
    assert {"learner.betas", "node.grace_s", "evaluation.data.path", "teacher.urls"} <= set(paths)


def test_a_field_of_another_version_and_a_value_of_another_type_are_shown_as_they_are() -> None:
    recipe = demo_recipe()
    recipe["learner"]["momentum"] = 0.9
    recipe["learner"]["autocast"] = True
    recipe["teacher"] = {"kind": "oracle", "path": "x"}
    recipe["node"] = None
    found = changed(recipe)

    assert found["learner.momentum"] == ("0.9", UNKNOWN)
    assert found["learner.autocast"] == ("true", "gpu")
    assert found["teacher"][0] == '{"kind":"oracle","path":"x"}'
    assert found["node"][0] == "null"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"),
        ("", '""'),
        (" padded", '" padded"'),
        ("two\nlines", '"two\\nlines"'),
        (1.0, "1"),
        (0.25, "0.25"),
        (None, "null"),
        ([1, "a"], '[1,"a"]'),
    ],
)
def test_values_are_told_apart(value: object, text: str) -> None:
    assert settings({"mine": value}) == [Setting(path="mine", value=text, default=UNKNOWN)]
