"""The solver in C beside the algebra that it repeats: same numbers to the last digits of float64."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ops.native_solve
from ops import JSD, ForwardKL, Mixture, ReverseKL, TeacherScores
from ops.kernels import solver_for
from ops.native_library import load_library
from ops.native_solve import NativeSolver, native_solver
from ops.objectives import Plain
from ops.rows import Reduced
from ops.scores import Support, support_of
from ops.shards import Shard
from ops.solve import Conditions
from ops.solved import Solution
from ops.torch_solve import solve_by_torch
from tests.ops.cases import COMPARISONS, Case, cases, make_case
from tests.ops.solvers import (
    at_the_edges,
    check,
    conditions_of,
    nearly_all_mass,
    reduce,
    scores_of_all_kinds,
    whole_shard,
)


@pytest.fixture(scope="session")
def solver() -> NativeSolver:
    """Not ``native_solver()`` alone: where there is a compiler, these tests may not pass for want of a library."""
    load_library()
    found = native_solver()
    assert found is not None
    return found


def solve(objective: Plain, logits: Tensor, scores: TeacherScores, conditions: Conditions) -> Solution:
    solver = native_solver()
    assert solver is not None
    support = support_of(scores, vocab_size=logits.shape[1])
    return solver(objective, reduce(logits, support), logits, support, conditions, whole_shard(logits))


pytestmark = pytest.mark.usefixtures("solver")


@given(objective=st.sampled_from(COMPARISONS), case=cases(), data=st.data())
def test_every_objective_is_solved_as_by_the_algebra(objective: Plain, case: Case, data: st.DataObject) -> None:
    check(solve, objective, case.logits, case.scores, data.draw(conditions_of(len(case.logits))))


@pytest.mark.parametrize("objective", COMPARISONS, ids=repr)
@pytest.mark.parametrize("top_k", [1, 6, 7, 8, 64, 300])
def test_a_list_of_any_length_is_solved_as_by_the_algebra(objective: Plain, top_k: int) -> None:
    """Whole vectors, and one category more or less."""
    case = make_case(num_rows=5, vocab_size=300, top_k=top_k, num_padded=top_k // 20, num_masked=9, seed=3)
    check(solve, objective, case.logits, case.scores, Conditions(temperature=0.7, clamp=0.4))


@pytest.mark.parametrize("objective", COMPARISONS, ids=repr)
def test_rows_at_the_edges_are_solved_as_by_the_algebra(objective: Plain) -> None:
    check(solve, objective, *at_the_edges(), Conditions())


@pytest.mark.parametrize("objective", COMPARISONS, ids=repr)
def test_a_teachers_mass_of_nearly_one_leaves_a_tail(objective: Plain) -> None:
    check(solve, objective, *nearly_all_mass(), Conditions())


@pytest.mark.parametrize("objective", COMPARISONS, ids=repr)
@pytest.mark.parametrize("temperature", [1e-6, 0.05, 50.0, 1e6])
def test_any_temperature_is_solved_as_by_the_algebra(objective: Plain, temperature: float) -> None:
    case = make_case(num_rows=5, vocab_size=40, top_k=9, scale=5.0)
    check(solve, objective, case.logits, case.scores, Conditions(temperature=temperature))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 9])
@pytest.mark.parametrize("objective", COMPARISONS, ids=repr)
def test_what_is_not_a_number_is_seen_in_its_row_alone(objective: Plain, column: int, wrong: float) -> None:
    """In the support and in the tail."""
    case = make_case(num_rows=3, vocab_size=12, top_k=3)
    scores = replace(case.scores, top_ids=torch.tensor([[0, 1, 2]]).repeat(3, 1), sampled_ids=torch.full((3,), -1))
    case.logits[1, column] = wrong

    found = solve(objective, case.logits, scores, Conditions())

    assert found.values.isnan().tolist() == [False, True, False]
    assert found.support_gradient[[0, 2]].isfinite().all()
    assert not found.support_gradient[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("float_dtype", [torch.float16, torch.float32, torch.float64])
def test_the_support_is_that_of_the_scores(solver: NativeSolver, dtype: torch.dtype, float_dtype: torch.dtype) -> None:
    scores = scores_of_all_kinds(dtype, float_dtype)
    expected = support_of(scores, vocab_size=10)

    found = solver.support(scores, vocab_size=10)

    for name in ("ids", "logprobs", "sampled_ids"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.num_top == 3
    with pytest.raises(ValueError, match="token id 9 and the student's vocabulary has 9"):
        solver.support(scores, vocab_size=9)


def test_several_threads_do_what_one_does() -> None:
    case = make_case(num_rows=3000, vocab_size=80, top_k=40)
    num_threads = torch.get_num_threads()
    alone = solve(JSD(), case.logits, case.scores, Conditions())
    try:
        torch.set_num_threads(3)
        together = solve(JSD(), case.logits, case.scores, Conditions())
    finally:
        torch.set_num_threads(num_threads)

    assert torch.equal(together.values, alone.values)
    assert torch.equal(together.support_gradient, alone.support_gradient)


def test_no_rows_have_no_solution() -> None:
    case = make_case(num_rows=0)
    found = solve(ForwardKL(), case.logits, case.scores, Conditions())

    assert found.values.shape == (0,)
    assert found.support_gradient.shape == (0, case.scores.top_ids.shape[1] + 1)


def test_it_solves_plain_objectives_on_cpu_in_any_dtype_and_torch_does_the_rest(solver: NativeSolver) -> None:
    logits = torch.zeros(1, 5)
    shard = whole_shard(logits)

    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert solver_for(ReverseKL(), shard, logits.to(dtype)) is solver
    assert solver_for(Mixture((1.0, ForwardKL())), shard, logits) is solve_by_torch
    assert solver_for(ForwardKL(), shard, logits.to("meta")) is solve_by_torch


def test_a_library_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def other(
        objective: Plain, reduced: Reduced, logits: Tensor, support: Support, conditions: Conditions, shard: Shard
    ) -> Solution:
        right = solve_by_torch(objective, reduced, logits, support, conditions, shard)
        return replace(right, values=right.values * 1.000001)

    monkeypatch.setattr(ops.native_solve, "solve_by_torch", other)
    with caplog.at_level(logging.WARNING):
        assert native_solver.__wrapped__() is None
    assert "computes another result" in caplog.text
