"""Sums of gradients and gathers of weights that go on beside the passes change when ranks wait, and no number. Real
ranks under gloo."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from engine.errors import RecipeError
from engine.megatron_config import MegatronConfig
from tests.engine.training.megatron.rank_cases import ON_RANKS, make_rollouts, num_ranks, settings
from tests.engine.training.megatron.students import STUDENTS, make_student
from tests.support.worlds import Worlds

SUMS = {"overlap_grad_reduce": True}
BOTH = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {"data_parallel": 2},
    "EP2 PP2": {"data_parallel": 2, "expert_parallel": 2, "pipeline_parallel": 2},
}
STUDENT_OF = {"DP2": "qwen3", "EP2 PP2": "moonlight"}
SMALL = 2000
"""Parameters of a bucket, where one layer of these students has some 8,000."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_student(name, tmp_path_factory.mktemp("student")) for name in STUDENT_OF.values()}


@lru_cache
def steps_of(layout: str, num_steps: int = 3) -> list[Any]:
    """Of two calls; in the second some passes of some shares have nothing to learn."""
    vocab_size = STUDENTS[STUDENT_OF[layout]].vocab_size
    return [
        [make_rollouts(num, vocab_size=vocab_size, seed=2 * step + call) for call, num in enumerate((4, 5))]
        for step in range(num_steps)
    ]


def run(
    worlds: Worlds, folders: dict[str, Path], layout: str, switches: dict[str, Any], steps: Any = None, **options: Any
) -> Any:
    cut = LAYOUTS[layout] | switches
    # Without clipping an element of an update depends on nothing that is summed over shards, whose borders are those
    # of buckets.
    told = settings(folders[STUDENT_OF[layout]], cut, grad_clip=None)
    return worlds.run(f"{ON_RANKS}:train_overlapped", num_ranks(cut), told, steps or steps_of(layout), options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_and_versions_are_the_same(layout: str, folders: dict[str, Path], worlds: Worlds) -> None:
    plain = run(worlds, folders, layout, {})
    assert all(found == [(0, num)] * 3 for one in plain for found in [one.sums_begun] for _, num in found[:1])

    for switches, bucket_size, tells_last in (
        (SUMS, SMALL, True),
        (SUMS, SMALL, False),
        (BOTH, None, True),
        (BOTH, SMALL, True),
        (BOTH, SMALL, False),
    ):
        seen = run(worlds, folders, layout, switches, bucket_size=bucket_size, tells_last=tells_last)

        assert seen[0].versions == plain[0].versions
        for ours, theirs in zip(seen[0].steps, plain[0].steps, strict=True):
            assert ours.loss == theirs.loss
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-6)
            assert (ours.num_tokens, ours.num_micro_batches) == (theirs.num_tokens, theirs.num_micro_batches)
        for one in seen:
            (_, num_buckets), *_ = one.sums_begun
            # In the first step Megatron learns how often each gradient comes.
            after_first = num_buckets if tells_last else 0
            assert one.sums_begun == [(0, num_buckets), *[(after_first, num_buckets)] * 2]
            gathering = num_buckets if switches is BOTH else 0
            assert one.gathers_begun == [(gathering, num_buckets)] * 3
            assert one.late == ("the last call of step 3 has been made; finish_step comes next" if tells_last else "")
        most = max(one.sums_begun[0][1] for one in seen)
        assert most >= 4 if bucket_size == SMALL else most <= 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_is_whole_while_weights_are_gathered(
    layout: str, folders: dict[str, Path], worlds: Worlds, tmp_path: Path
) -> None:
    """And knows nothing of buckets: written with them it goes on without, and the other way round."""
    steps = steps_of(layout, 4)
    whole = run(worlds, folders, layout, {}, steps=steps)[0]
    for before, after in (({}, BOTH), (BOTH, {})):
        saved = tmp_path / f"{len(before)}{len(after)}"
        first = run(worlds, folders, layout, before, bucket_size=SMALL, steps=steps[:2], save=saved)[0]
        then = run(worlds, folders, layout, after, bucket_size=SMALL, steps=steps[2:], load=saved)[0]

        assert first.versions + then.versions == whole.versions
        assert [step.loss for step in then.steps] == [step.loss for step in whole.steps[2:]]


def test_many_gathers_at_once_leave_memory_whole(folders: dict[str, Path], worlds: Worlds) -> None:
    """Megatron's own, of buckets together, end such a process within a few hundred under gloo."""
    told = settings(folders["qwen3"], LAYOUTS["DP2"] | BOTH)

    assert worlds.run(f"{ON_RANKS}:gather_often", 2, told, 300) == [True, True]


def test_weights_are_gathered_in_the_buckets_of_the_gradients() -> None:
    with pytest.raises(RecipeError, match=r"overlap_param_gather=true needs overlap_grad_reduce=true"):
        MegatronConfig(overlap_param_gather=True)
