"""A teacher's logits in compiled kernels, beside plain torch in float64: what both kinds of them are shown."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ops.dense import Dense
from ops.objectives import Plain
from ops.shards import Shard
from ops.solve import Conditions
from ops.solved import Problem, Solved
from tests.ops.cases import COMPARISONS


class Maker(Protocol):
    def __call__(self, objective: Plain, teacher: Tensor, shard: Shard, conditions: Conditions, /) -> Problem: ...


OBJECTIVES = tuple(objective for objective in COMPARISONS if objective.tail == "bucket")  # tails play no part
PLAIN = Conditions()
BENT = Conditions(
    temperature=0.7, square_temperature=True, clamp=2.5, token_weights=torch.tensor([0.5, -1.0, 2.0, 1.0, 1.0])
)


def make_logits(vocab_size: int, dtype: torch.dtype, *, num_padded: int = 0) -> tuple[Tensor, Tensor]:
    """[5, W] of student and teacher. Rows: as they come; columns missing in either and in both; ±1000 and far apart;
    equal; one column left. Padding holds NaN."""
    random = torch.Generator().manual_seed(vocab_size)
    student, teacher = torch.randn(2, 5, vocab_size, generator=random) * 3.0
    third = vocab_size // 3
    student[1, third : third + 9] = -torch.inf
    teacher[1, third + 5 : third + 20] = -torch.inf
    student[2, ::2] = 1e3
    student[2, 1::2] = -1e3
    teacher[2, 0] = 1e3
    teacher[3] = student[3]
    student[4, 1:] = -torch.inf
    padding = torch.full((5, num_padded), torch.nan)
    return torch.cat((student, padding), dim=1).to(dtype), torch.cat((teacher, padding), dim=1).to(dtype)


def written(solved: Solved, logits: Tensor, *, scale: Tensor | None = None) -> Tensor:
    out = torch.full_like(logits, torch.nan)
    solved.write(out, logits, scale)
    return out.double().cpu()


def check(
    make: Maker,
    objective: Plain,
    conditions: Conditions,
    logits: Tensor,
    teacher: Tensor,
    num_columns: int,
    *,
    device: str = "cpu",
    gradient_rtol: float = 2e-5,
) -> None:
    shard = Shard(start=0, num_columns=num_columns, vocab_size=num_columns)
    exact = logits.double(), teacher.double()
    expected = Dense(objective, exact[1], shard, conditions, block_rows=2).solve(exact[0], 0, len(logits))
    weights = None if conditions.token_weights is None else conditions.token_weights.to(device)
    there = Conditions(
        temperature=conditions.temperature,
        square_temperature=conditions.square_temperature,
        clamp=conditions.clamp,
        token_weights=weights,
    )
    logits, teacher = logits.to(device), teacher.to(device)

    found = make(objective, teacher, shard, there).solve(logits, 0, len(logits))

    assert_close(found.values, expected.values, "values", rtol=2e-5, atol=2e-6)
    for name, metric in expected.metrics.items():
        assert_close(found.metrics[name], metric, name, rtol=2e-5, atol=2e-6)
    scale = torch.linspace(-2.0, 3.0, len(logits))
    gradient = written(expected, exact[0], scale=scale.double())
    assert_close(written(found, logits, scale=scale.to(device)), gradient, "gradient", gradient_rtol, 5e-6)
    found.write(logits, logits)
    assert_close(logits, written(expected, exact[0]), "gradient in place", gradient_rtol, 5e-6)


def assert_close(found: Tensor, expected: Tensor, name: str, rtol: float, atol: float) -> None:
    torch.testing.assert_close(found.double().cpu(), expected, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")
