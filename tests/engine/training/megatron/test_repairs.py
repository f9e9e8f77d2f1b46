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
