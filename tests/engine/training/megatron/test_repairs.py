"""Each repair of Megatron-core is taken away again, and something goes wrong. When it does not, delete the repair."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.training.megatron.rank_cases import ON_RANKS, make_rollouts, settings
from tests.engine.training.megatron.students import STUDENTS, make_student
from tests.support.worlds import Worlds

STEPS = [[make_rollouts(3, vocab_size=STUDENTS["moonlight"].vocab_size)]]


@pytest.mark.parametrize(("repair", "error"), [("te_general_gemm", NameError), ("HAVE_TE", TypeError)])
def test_a_name_that_is_there_only_with_transformer_engine(
    repair: str, error: type[Exception], worlds: Worlds, tmp_path: Path
) -> None:
    with pytest.raises(error):
        worlds.run(f"{ON_RANKS}:train_without", 1, repair, settings(make_student("moonlight", tmp_path)), STEPS)


def test_another_version_of_megatron_is_not_repaired(worlds: Worlds) -> None:
    (said,) = worlds.run(f"{ON_RANKS}:repaired_with", 1, "0.17.0")

    assert said.startswith("a learner without CUDA needs megatron-core 0.16.1, whose inner names")
    assert said.endswith(
        "and 0.17.0 is installed; install megatron-core==0.16.1, or train on CUDA with TransformerEngine"
    )
