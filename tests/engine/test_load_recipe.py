"""A recipe file whose function takes parameters, set from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import RecipeError
from engine.load_recipe import load_recipe

FILE = """
from __future__ import annotations
from typing import Literal
from engine.recipe import *

def recipe(size: Literal["small", "large"] = "small", steps: int = 3, name="p", rate: float | None = None):
    return Recipe(
        name=f"{name}-{size}",
        steps=steps,
        student=StudentConfig(path="s"),
        teacher=LocalTeacher(model="t"),
        data=DataConfig(path="d"),
        rollouts_per_step=8 if size == "small" else 64,
        learner=LearnerConfig(lr=rate or 1e-5),
    )
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "sized.py"
    path.write_text(FILE)
    return path


def test_parameters_go_into_the_call_and_fields_into_what_it_returns(path: Path) -> None:
    recipe, _ = load_recipe(path, ["size=large", "learner.lr=2", "rate=0.5", "steps=7", "max_staleness=4"])

    assert (recipe.name, recipe.rollouts_per_step, recipe.steps) == ("p-large", 64, 7)
    assert (recipe.learner.lr, recipe.max_staleness) == (2.0, 4), "the field is set after the call"


def test_without_assignments_the_defaults_hold(path: Path) -> None:
    assert load_recipe(path, [])[0].name == "p-small"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "size=huge",
            r"--set size=huge: recipe\(\) in .*sized.py takes size: Literal\['small', 'large'\]; Invalid enum",
        ),
        ("steps=few", r"takes steps: int; Expected `int`"),
        ("siez=large", r"'siez' is neither a parameter of recipe\(\) in .*, which are size, steps, .* nor a field"),
        ("learner.lrr=1", r"no field 'learner.lrr' in this recipe"),
        ("size", r"expected field=value"),
        ("learner.autocast=yes", r"value 'yes' - at `\$\.learner\.autocast`; expected one of 'auto', 'gpu', 'off'"),
        ("sinks.wandb.mode=x", r"`\$\.sinks\.wandb\.mode`; expected one of 'disabled', 'offline', 'online'"),
    ],
)
def test_a_wrong_assignment_says_what_is_right(path: Path, assignment: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(path, [assignment])


def test_a_parameter_without_default_must_be_set(tmp_path: Path) -> None:
    path = tmp_path / "needy.py"
    path.write_text("def recipe(size): return size\n")

    with pytest.raises(RecipeError, match="missing 1 required positional argument: 'size'"):
        load_recipe(path, [])
