"""The kernels on few columns beside the algebra that they repeat: same numbers to the last digits of float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops import TeacherScores
from ops.objectives import Plain
from ops.scores import support_of
from ops.solve import Conditions
from ops.solved import Solution
from tests.ops.cases import COMPARISONS, Case, cases, make_case
from tests.ops.solvers import (
    Solve,
    at_the_edges,
    check,
    conditions_of,
    nearly_all_mass,
    reduce,
    scores_of_all_kinds,
    whole_shard,
)
from tests.ops.triton_devices import INTERPRETED, on_each_device

from ops.triton_solve import solve_by_triton, support_by_triton  # isort: skip  # the line above skips without triton

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


def on(device: str, scores: TeacherScores) -> TeacherScores:
    return replace(
        scores,
        top_ids=scores.top_ids.to(device),
        top_logprobs=scores.top_logprobs.to(device),
        sampled_ids=scores.sampled_ids.to(device),
        sampled_logprobs=scores.sampled_logprobs.to(device),
    )


def solve_on(device: str) -> Solve:
    """float64 all the way: what reduces the rows is plain torch."""

    def solve(objective: Plain, logits: Tensor, scores: TeacherScores, conditions: Conditions) -> Solution:
        support = support_by_triton(on(device, scores), vocab_size=logits.shape[1])
        logits = logits.to(device)
        reduced = reduce(logits, support)
        weights = conditions.token_weights
        there = replace(conditions, token_weights=None if weights is None else weights.to(device))
        return solve_by_triton(objective, reduced, logits, support, there, whole_shard(logits))

    return solve


@pytest.mark.skipif(not INTERPRETED, reason="on a card each draw would be compiled")
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(objective=st.sampled_from(COMPARISONS), case=cases(), data=st.data())
def test_every_objective_is_solved_as_by_the_algebra(objective: Plain, case: Case, data: st.DataObject) -> None:
    check(solve_on("cpu"), objective, case.logits, case.scores, data.draw(conditions_of(len(case.logits))))


@on_each_device
@pytest.mark.parametrize("objective", COMPARISONS, ids=repr)
def test_a_list_of_64_is_solved_as_by_the_algebra(device: str, objective: Plain) -> None:
    case = make_case(num_rows=5, vocab_size=300, top_k=64, num_padded=3, num_masked=9, seed=3)
    check(solve_on(device), objective, case.logits, case.scores, Conditions(temperature=0.7, clamp=0.4))


@on_each_device
@pytest.mark.parametrize("objective", COMPARISONS, ids=repr)
def test_rows_at_the_edges_are_solved_as_by_the_algebra(device: str, objective: Plain) -> None:
    check(solve_on(device), objective, *at_the_edges(), Conditions())


@on_each_device
@pytest.mark.parametrize("objective", COMPARISONS, ids=repr)
def test_a_teachers_mass_of_nearly_one_leaves_a_tail(device: str, objective: Plain) -> None:
    check(solve_on(device), objective, *nearly_all_mass(), Conditions())


@on_each_device
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_support_is_that_of_the_scores(device: str, dtype: torch.dtype) -> None:
    scores = scores_of_all_kinds(dtype, torch.float32)
    expected = support_of(scores, vocab_size=10)

    found = support_by_triton(on(device, scores), vocab_size=10)

    for name in ("ids", "logprobs"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
    assert torch.equal(found.sampled_ids.cpu(), expected.sampled_ids)
    assert found.num_top == 3


@pytest.mark.skipif(not INTERPRETED, reason="a failed assertion ends the use of a card")
def test_an_id_beyond_the_vocabulary_is_refused() -> None:
    scores = make_case(vocab_size=11).scores

    with pytest.raises(RuntimeError, match="token id is not below"):
        support_by_triton(scores, vocab_size=int(scores.top_ids.max()))


@on_each_device
def test_no_rows_have_no_solution(device: str) -> None:
    case = make_case(num_rows=0)
    found = solve_on(device)(COMPARISONS[0], case.logits, case.scores, Conditions())

    assert found.values.shape == (0,)
    assert found.support_gradient.shape == (0, case.scores.top_ids.shape[1] + 1)
