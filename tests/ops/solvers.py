"""A solver on few columns beside the algebra that it repeats, on rows at the edges of what there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch
from hypothesis import strategies as st
from torch import Tensor

from ops import TeacherScores
from ops.objectives import Plain
from ops.rows import Reduced
from ops.scores import Support, support_of
from ops.shards import Shard
from ops.solve import Conditions
from ops.solved import Solution
from ops.torch_rows import TorchRows
from ops.torch_solve import solve_by_torch
from tests.ops.cases import make_case

Solve: TypeAlias = Callable[[Plain, Tensor, TeacherScores, Conditions], Solution]


def reduce(logits: Tensor, support: Support) -> Reduced:
    return TorchRows().reduce(logits, support.ids, num_columns=logits.shape[1], k=support.num_top)


def whole_shard(logits: Tensor) -> Shard:
    return Shard(start=0, num_columns=logits.shape[1], vocab_size=logits.shape[1])


def by_torch(objective: Plain, logits: Tensor, scores: TeacherScores, conditions: Conditions) -> Solution:
    support = support_of(scores, vocab_size=logits.shape[1])
    return solve_by_torch(objective, reduce(logits, support), logits, support, conditions, whole_shard(logits))


def check(
    solve: Solve,
    objective: Plain,
    logits: Tensor,
    scores: TeacherScores,
    conditions: Conditions,
) -> None:
    expected = by_torch(objective, logits, scores, conditions)
    rtol = 1e-9 + rounding_of_tails(scores, logits.shape[1])

    found = solve(objective, logits, scores, conditions)

    for name in ("values", "tail_shift", "tail_scale", "support_gradient"):
        _assert_close(getattr(found, name), getattr(expected, name), name, rtol)
    for name, metric in expected.metrics.items():
        _assert_close(found.metrics[name], metric, name, rtol)


def rounding_of_tails(scores: TeacherScores, vocab_size: int) -> float:
    """Relative, the largest of all rows: a tail is 1 − mass, whose last digits depend on the order of the sum; of
    1 − (1 − 1e-12) float64 holds four. What is left by rounding alone is no tail."""
    left = 1.0 - support_of(scores, vocab_size=vocab_size).logprobs.exp().sum(dim=1)
    return float(torch.where(left > 1e-13, torch.finfo(torch.float64).eps / left, 0.0).max())


def _assert_close(found: Tensor, expected: Tensor, name: str, rtol: float) -> None:
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


def at_the_edges() -> tuple[Tensor, TeacherScores]:
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
    return logits, TeacherScores(
        top_ids=top_ids, top_logprobs=top_logprobs, sampled_ids=sampled_ids, sampled_logprobs=sampled_logprobs
    )


def nearly_all_mass() -> tuple[Tensor, TeacherScores]:
    case = make_case(num_rows=2, vocab_size=12, top_k=4, sampled="inside")
    probs = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64) * (1 - 1e-12)
    return case.logits, replace(
        case.scores, top_logprobs=probs.log().repeat(2, 1), sampled_ids=case.scores.top_ids[:, 1].contiguous()
    )


def scores_of_all_kinds(id_dtype: torch.dtype, dtype: torch.dtype) -> TeacherScores:
    """Below 10: a sampled token in the list, outside, absent; padding; a log-probability of −inf, of the sampled token,
    too. Rows of wider tensors, as of scores that hold more than is asked for."""
    top_ids = torch.tensor([[4, 7, -1], [4, 7, 9], [1, 2, 3], [-1, -1, -1], [5, 6, 7]], dtype=id_dtype)
    top_logprobs = torch.tensor(
        [[-1.0, -2.0, 7.0], [-1.0, -torch.inf, -2.0], [-1.0, -2.0, -3.0], [7.0, 7.0, 7.0], [-1.0, -2.0, -3.0]],
        dtype=dtype,
    )
    return TeacherScores(
        top_ids=torch.nn.functional.pad(top_ids, (0, 2))[:, :3],
        top_logprobs=torch.nn.functional.pad(top_logprobs, (0, 1))[:, :3],
        sampled_ids=torch.tensor([7, 7, 8, 0, -1], dtype=id_dtype),
        sampled_logprobs=torch.tensor([-2.0, -3.0, -torch.inf, -1.0, 7.0], dtype=dtype),
    )
