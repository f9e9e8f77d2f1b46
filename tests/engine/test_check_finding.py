"""When this is not the machine that will run a recipe, and what is then left open instead of wrong."""

from __future__ import annotations

import pytest

from engine.check.finding import Findings, State, is_elsewhere, state_of
from engine.errors import (
    DataAbsent,
    DataError,
    EngineError,
    ModelAbsent,
    PackageAbsent,
    RecipeError,
    TeacherMismatch,
)


@pytest.mark.parametrize(
    ("devices", "num_gpus", "elsewhere"),
    [
        (("cpu", "cpu"), 0, False),
        (("cuda:0", "cpu"), 0, True),
        (("cpu", "cuda"), 0, True),
        (("cuda:7",), 1, False),  # one of eight: the right kind of machine, and too small
        (("cpu",), 4, False),
        (("teapot", "cuda0"), 0, False),  # no devices anywhere
    ],
)
def test_only_a_machine_without_any_gpu_is_the_wrong_one(
    devices: tuple[str, ...], num_gpus: int, elsewhere: bool
) -> None:
    assert is_elsewhere(devices, num_gpus=num_gpus) is elsewhere


@pytest.mark.parametrize("kind", [ModelAbsent, DataAbsent, PackageAbsent])
def test_what_is_absent_is_wrong_where_the_recipe_runs_and_open_elsewhere(kind: type[ModelAbsent]) -> None:
    error = kind("it is not here", remedy="get it")

    assert state_of(error, elsewhere=False, of_machine=False) == "wrong"
    assert state_of(error, elsewhere=True, of_machine=False) == "open"


@pytest.mark.parametrize("error", [DataError("line 3"), RecipeError("no"), TeacherMismatch("another tokenizer")])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_is_there_and_wrong_is_wrong_everywhere(error: EngineError, elsewhere: bool) -> None:
    assert state_of(error, elsewhere=elsewhere, of_machine=False) == "wrong"


@pytest.mark.parametrize(("elsewhere", "state"), [(False, "wrong"), (True, "open")])
def test_a_port_of_this_machine_says_nothing_of_another(elsewhere: bool, state: State) -> None:
    assert state_of(RecipeError("port 80 is taken"), elsewhere=elsewhere, of_machine=True) == state


def test_the_command_that_brings_it_goes_with_what_is_open() -> None:
    def look() -> tuple[str, None]:
        raise ModelAbsent("no folder 'm'", remedy="get it with: fetch m", bring="fetch m")

    here, there = Findings(elsewhere=False), Findings(elsewhere=True)
    assert here.look("student", look) is there.look("student", look) is None

    (wrong,), (still_open,) = here.all, there.all
    assert (wrong.state, wrong.text) == ("wrong", "no folder 'm'; get it with: fetch m")
    assert (still_open.state, still_open.text, still_open.to_do) == ("open", "no folder 'm'", "fetch m")
