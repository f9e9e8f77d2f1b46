"""The kernels on few columns beside the algebra that they repeat: same numbers to the last digits of float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops import TeacherScores
from ops.listed import Listed, Rows
from ops.objectives import Plain
from ops.scores import support_of
from ops.shards import Shard
from ops.solve import Conditions
from ops.solved import Solution
from ops.torch_rows import TorchRows
from tests.ops.cases import COMPARISONS, Case, cases, make_case
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


def by_triton(objective: Plain, logits: Tensor, scores: TeacherScores, conditions: Conditions, device: str) -> Solution:
    """float64 all the way: what reduces the rows is plain torch."""
    support = support_by_triton(on(device, scores), vocab_size=logits.shape[1])
    logits = logits.to(device)
    kernel = TorchRows()
    reduced = kernel.reduce(logits, support.ids, num_columns=logits.shape[1], k=support.num_top)
    weights = conditions.token_weights
    there = replace(conditions, token_weights=None if weights is None else weights.to(device))
    return solve_by_triton(objective, reduced, logits, support, there)


def check(
    objective: Plain,
    logits: Tensor,
    scores: TeacherScores,
    conditions: Conditions,
    device: str = "cpu",
    rtol: float = 1e-9,
) -> None:
    shard = Shard(start=0, num_columns=logits.shape[1], vocab_size=logits.shape[1])
    expected = Listed(objective, scores, shard, conditions).solve(logits, 0, len(logits))
    assert isinstance(expected, Rows)

    found = by_triton(objective, logits, scores, conditions, device)

    for name in ("values", "tail_shift", "tail_scale", "support_gradient"):
        assert_close(getattr(found, name), getattr(expected, name), name, rtol)
    for name, metric in expected.metrics.items():
        assert_close(found.metrics[name], metric, name, rtol)


def assert_close(found: Tensor, expected: Tensor, name: str, rtol: float) -> None:
    # atol: with logits of ±1e4 gradients are differences of numbers that float64 holds to 1e-12.
    assert not found.isnan().any(), f"{name}: {found}"
    torch.testing.assert_close(
        found.cpu(), expected.double(), rtol=rtol, atol=1e-11, msg=lambda text: f"{name}: {text}"
    )


@st.composite
def conditions_of(draw: st.DrawFn, num_rows: int) -> Conditions:
    weights = torch.linspace(-1.0, 2.0, num_rows) if draw(st.booleans()) else None
    return Conditions(
        temperature=draw(st.sampled_from((1.0, 0.5, 3.0))),
        square_temperature=draw(st.booleans()),
        clamp=draw(st.sampled_from((None, 0.1, 3.0))),
        token_weights=weights,
    )


@pytest.mark.skipif(not INTERPRETED, reason="on a card each draw would be compiled")
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(objective=st.sampled_from(COMPARISONS), case=cases(), data=st.data())
def test_every_objective_is_solved_as_by_the_algebra(objective: Plain, case: Case, data: st.DataObject) -> None:
    check(objective, case.logits, case.scores, data.draw(conditions_of(len(case.logits))))


@on_each_device
@pytest.mark.parametrize("objective", COMPARISONS, ids=repr)
def test_a_list_of_64_is_solved_as_by_the_algebra(device: str, objective: Plain) -> None:
    case = make_case(num_rows=5, vocab_size=300, top_k=64, num_padded=3, num_masked=9, seed=3)
    check(objective, case.logits, case.scores, Conditions(temperature=0.7, clamp=0.4), device)


@on_each_device
@pytest.mark.parametrize("objective", COMPARISONS, ids=repr)
def test_rows_at_the_edges_are_solved_as_by_the_algebra(device: str, objective: Plain) -> None:
    """Rows: nothing named; a column that only the teacher has; the teacher's mass above 1; logits of ±1e4; all alike;
    no column at all."""
    logits = torch.linspace(-2.0, 3.0, 12, dtype=torch.float64).repeat(6, 1)
    top_ids = torch.tensor([0, 3, 5, 11]).repeat(6, 1)
    top_logprobs = torch.tensor([0.1, 0.2, 0.3, 0.05], dtype=torch.float64).log().repeat(6, 1)
    sampled_ids = torch.tensor([-1, 3, 0, 4, 5, 2])
    top_ids[0] = -1
    logits[1, 5] = -torch.inf
    top_logprobs[2] = (torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64) * (1 + 1e-9)).log()
    logits[3] = torch.where(torch.arange(12) % 2 == 0, 1e4, -1e4)
    logits[4] = 1.0
    logits[5] = -torch.inf
    sampled_logprobs = torch.full((6,), -2.0, dtype=torch.float64)
    scores = TeacherScores(
        top_ids=top_ids, top_logprobs=top_logprobs, sampled_ids=sampled_ids, sampled_logprobs=sampled_logprobs
    )
    check(objective, logits, scores, Conditions(), device)


@on_each_device
@pytest.mark.parametrize("objective", COMPARISONS, ids=repr)
def test_a_teachers_mass_of_nearly_one_leaves_a_tail(device: str, objective: Plain) -> None:
    """Of 1 − (1 − 1e-12) float64 holds four digits, which depend on the order of the sum."""
    case = make_case(num_rows=2, vocab_size=12, top_k=4, sampled="inside")
    probs = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64) * (1 - 1e-12)
    scores = replace(
        case.scores, top_logprobs=probs.log().repeat(2, 1), sampled_ids=case.scores.top_ids[:, 1].contiguous()
    )
    check(objective, case.logits, scores, Conditions(), device, rtol=1e-4)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_support_is_that_of_the_scores(device: str, dtype: torch.dtype) -> None:
    """A sampled token in the list, outside, absent; padding; a log-probability of −inf, of the sampled token, too."""
    scores = TeacherScores(
        top_ids=torch.tensor([[4, 7, -1], [4, 7, 9], [1, 2, 3], [-1, -1, -1], [5, 6, 7]], dtype=dtype),
        top_logprobs=torch.tensor(
            [[-1.0, -2.0, 7.0], [-1.0, -torch.inf, -2.0], [-1.0, -2.0, -3.0], [7.0, 7.0, 7.0], [-1.0, -2.0, -3.0]]
        ),
        sampled_ids=torch.tensor([7, 7, 8, 0, -1], dtype=dtype),
        sampled_logprobs=torch.tensor([-2.0, -3.0, -torch.inf, -1.0, 7.0]),
    )
    expected = support_of(scores, vocab_size=10)

    # Rows of a wider tensor, as of scores that hold more than is asked for.
    wide = replace(on(device, scores), top_ids=torch.nn.functional.pad(scores.top_ids, (0, 2)).to(device)[:, :3])
    found = support_by_triton(wide, vocab_size=10)

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
    found = by_triton(COMPARISONS[0], case.logits, case.scores, Conditions(), device)

    assert found.values.shape == (0,)
    assert found.support_gradient.shape == (0, case.scores.top_ids.shape[1] + 1)
