"""From recipe to sinks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from engine.errors import RecipeError
from engine.monitor.sinks.attach import check_sinks, make_sinks
from engine.monitor.sinks.tensorboard import TensorBoardSink
from engine.recipe import Recipe, WandbConfig, with_overrides
from tests.support.recipes import recipe_with


def names(recipe: Recipe) -> list[str]:
    return [sink.name for sink in make_sinks(recipe, Path("runs/first"), step=0)]


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        ([], []),
        (["sinks.tensorboard=true"], ["tensorboard"]),
        (["sinks.tensorboard=/mnt/curves"], ["tensorboard"]),
        (["sinks.tensorboard=false"], []),
        (["sinks.wandb.project=distillation"], ["wandb"]),
        (["sinks.wandb.project=distillation", "sinks.wandb.mode=disabled"], []),
        (["sinks.wandb.mode=offline"], []),
        (["sinks.tensorboard=true", "sinks.wandb.project=distillation"], ["tensorboard", "wandb"]),
    ],
)
def test_sinks_are_chosen_on_the_command_line(assignments: list[str], expected: list[str]) -> None:
    assert names(with_overrides(recipe_with(), assignments)) == expected


@pytest.mark.parametrize(("value", "expected"), [("offline", ["wandb"]), ("disabled", []), ("", ["wandb"])])
def test_the_environment_says_the_mode_when_the_recipe_does_not(
    monkeypatch: pytest.MonkeyPatch, value: str, expected: list[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", value)

    assert names(recipe_with(wandb=WandbConfig(project="x"))) == expected
    assert names(recipe_with(wandb=WandbConfig(project="x", mode="offline"))) == ["wandb"]


def test_an_unknown_mode_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "sometimes")

    with pytest.raises(RecipeError, match=r"WANDB_MODE='sometimes' in the environment, expected one of online, "):
        names(recipe_with(wandb=WandbConfig(project="x")))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("sinks.wandb.project=a/b", r"matching regex .* - at `\$\.sinks\.wandb\.project`"),
        ("sinks.wandb.mode=later", r"Invalid enum value 'later' - at `\$\.sinks\.wandb\.mode`"),
        ("sinks.tensorboard=", r"length >= 1 - at `\$\.sinks\.tensorboard`"),
        ("sinks.max_points=0", r">= 1 - at `\$\.sinks\.max_points`"),
        ("sinks.flush_s=0", r"> 0.0 - at `\$\.sinks\.flush_s`"),
        ("sinks.mlflow=true", r"no field 'sinks\.mlflow' in this recipe; the fields there are flush_s, max_points"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(assignment: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        with_overrides(recipe_with(), [assignment])


@pytest.mark.parametrize(
    ("setting", "out", "expected"),
    [
        (True, Path("/runs/first"), "/runs/first/tensorboard"),
        ("/mnt/curves", Path("/runs/first"), "/mnt/curves/first"),
        ("/mnt/curves", Path("."), f"/mnt/curves/{Path.cwd().name}"),
    ],
)
def test_runs_that_share_a_folder_have_each_its_own_beneath(setting: bool | str, out: Path, expected: str) -> None:
    (sink,) = make_sinks(recipe_with(tensorboard=setting), out, step=0)

    assert isinstance(sink, TensorBoardSink)
    assert str(sink.folder) == expected


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_named_with_its_extra(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    recipe = recipe_with(tensorboard=package == "tensorboard", wandb=WandbConfig(project="x", mode="offline"))

    with pytest.raises(RecipeError, match=rf"needs the package {package}, .*pip install 'slipstream\[{package}\]'"):
        check_sinks(recipe, tmp_path)
