"""A checkpoint is of a student and not of a layout: what goes on from it, in whichever pieces, goes on as if nothing
had happened. Two steps are looked at: the first one hides what is wrong with the optimizer's state."""

from __future__ import annotations

import os
import pickle
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import CheckpointError
from tests.engine.training.megatron.rank_cases import ON_RANKS, Steps, make_rollouts, num_ranks, settings
from tests.engine.training.megatron.students import STUDENTS, make_student
from tests.support.worlds import Worlds

LAYOUTS: dict[str, dict[str, Any]] = {
    "1": {},
    "DP2": {"data_parallel": 2},
    "TP2": {"tensor_parallel": 2, "sequence_parallel": False},
    "TP2 SP": {"tensor_parallel": 2},
    "PP2": {"pipeline_parallel": 2},
    "EP2": {"data_parallel": 2, "expert_parallel": 2},
    "TP2 SP PP2": {"tensor_parallel": 2, "pipeline_parallel": 2},
    "TP2 SP EP2 PP2": {"tensor_parallel": 2, "expert_parallel": 2, "pipeline_parallel": 2},
}


def steps_of(name: str, first: int, last: int) -> list[Any]:
    vocab_size = STUDENTS[name].vocab_size
    return [[make_rollouts(4, vocab_size=vocab_size, seed=step)] for step in range(first, last)]


class _Runs:
    """What a pickle can do to its reader."""

    def __init__(self, *words: object) -> None:
        self._command = " ".join(map(str, words))

    def __reduce__(self) -> Any:
        return os.system, (self._command,)


_CHANGES_A_CLASS = b"cpathlib\nPosixPath\n(N}X\x04\x00\x00\x00harmK\x01stb."
"""Names a class that is allowed, and sets an attribute of it."""


def run(worlds: Worlds, folder: Path, layout: str, *arguments: Any) -> list[Steps]:
    cut = LAYOUTS[layout]
    seen: list[Steps] = worlds.run(f"{ON_RANKS}:train", num_ranks(cut), settings(folder, cut), *arguments)
    return seen


@pytest.mark.parametrize(
    ("name", "saved_in", "resumed_in"),
    [
        ("qwen3", "TP2 SP PP2", ["1", "DP2", "TP2", "TP2 SP"]),
        ("qwen3", "TP2", ["1", "TP2 SP", "PP2"]),
        ("qwen3", "DP2", ["PP2"]),
        # Experts have an optimizer of their own only where they are spread.
        ("moonlight", "EP2", ["1", "TP2 SP EP2 PP2"]),
        ("moonlight", "1", ["EP2", "TP2 SP"]),
    ],
)
def test_the_next_two_steps_are_the_same_in_another_layout(
    name: str, saved_in: str, resumed_in: list[str], worlds: Worlds, tmp_path: Path
) -> None:
    student, checkpoint = make_student(name, tmp_path / "student"), tmp_path / "checkpoint"
    after = steps_of(name, 2, 4)
    seen = run(worlds, student, saved_in, steps_of(name, 0, 2), None, checkpoint, after)
    expected = seen[0].steps[2:]

    for layout in resumed_in:
        found = run(worlds, student, layout, after, checkpoint)[0].steps

        for ours, theirs in zip(found, expected, strict=True):
            assert (ours.step, ours.lr, ours.num_tokens) == (theirs.step, theirs.lr, theirs.num_tokens)
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-5), layout
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5), layout


@pytest.mark.parametrize(
    ("name", "layout", "saved_after"),
    [("qwen3", "TP2 SP", 1), ("qwen3", "TP2", 1), ("moonlight", "EP2", 1), ("qwen3", "1", 0)],
)
def test_in_the_same_layout_it_goes_on_bit_for_bit(
    name: str, layout: str, saved_after: int, worlds: Worlds, tmp_path: Path
) -> None:
    """Also before the first update, as it is when the first steps were skipped."""
    student, checkpoint = make_student(name, tmp_path / "student"), tmp_path / "checkpoint"
    after = steps_of(name, 1, 3)
    expected = run(worlds, student, layout, steps_of(name, 0, saved_after), None, checkpoint, after)
    found = run(worlds, student, layout, after, checkpoint)

    for ours, theirs in zip(found, expected, strict=True):
        for mine, other in zip(ours.gradients, theirs.gradients[saved_after:], strict=True):
            assert [name for name, _, _ in mine] == [name for name, _, _ in other]
            for (_, _, a), (_, _, b) in zip(mine, other, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_a_checkpoint_that_is_none_is_refused_by_name(worlds: Worlds, tmp_path: Path) -> None:
    student, checkpoint = make_student("qwen3", tmp_path / "student"), tmp_path / "checkpoint"
    run(worlds, student, "1", steps_of("qwen3", 0, 1), None, checkpoint)
    index = checkpoint / "trainer" / ".metadata"
    whole = index.read_bytes()
    assert b"_extra_state" not in whole, "torch would unpickle it"
    for harm, asked in (
        (_Runs("touch", tmp_path / "harmed"), "posix.system"),
        ({"a": _Runs("touch", tmp_path / "harmed")}, "posix.system"),
        (datetime(2026, 1, 1), "datetime.datetime"),
    ):
        index.write_bytes(pickle.dumps(harm))
        with pytest.raises(CheckpointError, match=rf"trainer state in '.*trainer' .* index asks for {asked}, which no"):
            run(worlds, student, "1", [], checkpoint)
    assert not (tmp_path / "harmed").exists()
    index.write_bytes(_CHANGES_A_CLASS)
    with pytest.raises(CheckpointError, match=r"its index would change the class PurePosixPath"):
        run(worlds, student, "1", [], checkpoint)
    assert b".distcp" in whole
    index.write_bytes(whole.replace(b"__0_0.distcp", b"/etc/hostnam"))
    with pytest.raises(CheckpointError, match=r"points to '/etc/hostnam', which is not a file of this folder"):
        run(worlds, student, "1", [], checkpoint)
    index.write_bytes(pickle.dumps([1]))
    with pytest.raises(
        CheckpointError, match=r"trainer state in '.*trainer' cannot be read: .* is a list and no index"
    ):
        run(worlds, student, "1", [], checkpoint)
    index.write_bytes(whole)
    run(worlds, student, "1", [], checkpoint)

    (broken,) = (checkpoint / "trainer").glob("*.distcp")
    broken.write_bytes(broken.read_bytes()[:1000])

    with pytest.raises(CheckpointError, match=r"trainer state in '.*trainer' cannot be read"):
        run(worlds, student, "1", [], checkpoint)

    (checkpoint / "trainer" / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"was it written with learner.backend='megatron'\?"):
        run(worlds, student, "1", [], checkpoint)
