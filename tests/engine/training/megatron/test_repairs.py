"""Each repair of Megatron-core is taken away again, and something goes wrong. When it does not, delete the repair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.training.megatron.rank_cases import ON_RANKS, make_rollouts, num_ranks, settings, whole_gradients
from tests.engine.training.megatron.students import STUDENTS, make_student
from tests.support.worlds import Worlds

STEPS = [[make_rollouts(3, vocab_size=STUDENTS["moonlight"].vocab_size)]]
DOWN = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"


def run(worlds: Worlds, function: str, folder: Path, layout: dict[str, Any], *arguments: Any) -> Any:
    arguments = (*arguments, settings(folder, layout), STEPS)
    return worlds.run(f"{ON_RANKS}:{function}", num_ranks(layout), *arguments)


@pytest.mark.parametrize(("repair", "error"), [("te_general_gemm", NameError), ("HAVE_TE", TypeError)])
def test_a_name_that_is_there_only_with_transformer_engine(
    repair: str, error: type[Exception], worlds: Worlds, tmp_path: Path
) -> None:
    with pytest.raises(error):
        run(worlds, "train_without", make_student("moonlight", tmp_path), {}, repair)


def test_down_projections_that_are_cut_get_wrong_gradients(worlds: Worlds, tmp_path: Path) -> None:
    folder = make_student("moonlight", tmp_path)
    right = whole_gradients(run(worlds, "train", folder, {}), 0)
    wrong = whole_gradients(run(worlds, "train_without", folder, {"tensor_parallel": 2}, "down-projections"), 0)

    assert float((wrong[DOWN] - right[DOWN]).norm() / right[DOWN].norm()) > 1e-2
