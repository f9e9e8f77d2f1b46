"""Random teachers and students for the tests of ``ops``, small enough for float64 and for gradcheck."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode

from ops import (
    JSD,
    ForwardKL,
    Mixture,
    Objective,
    ReverseKL,
    SampledReverseKL,
    SkewKL,
    StudentTopKReverseKL,
    TeacherScores,
)
from ops.objectives import Plain, Tail

TAILS: tuple[Tail, ...] = ("bucket", "renormalise", "ignore")
COMPARISONS: tuple[Plain, ...] = tuple(
    objective
    for tail in TAILS
    for objective in (
        ForwardKL(tail),
        ReverseKL(tail),
        JSD(0.5, tail),
        JSD(0.3, tail),
        SkewKL(0.1, tail=tail),
        SkewKL(0.1, reverse=True, tail=tail),
    )
)
"""Of the two models on S."""
DIVERGENCES: tuple[Objective, ...] = (
    *(objective for objective in COMPARISONS if objective.tail != "ignore"),
    StudentTopKReverseKL(1),
    StudentTopKReverseKL(3),
    Mixture((0.5, ForwardKL()), (2.0, Mixture((0.3, ReverseKL("renormalise")), (1.0, StudentTopKReverseKL(2))))),
)
"""Never negative, and zero where the models agree."""
PRIMITIVES: tuple[Objective, ...] = (
    *(objective for objective in COMPARISONS if objective.tail == "ignore"),
    *DIVERGENCES,
    SampledReverseKL("k3"),
    Mixture(
        (0.5, JSD(0.3, "ignore")),
        (0.25, SampledReverseKL("k3")),
        (1.0, StudentTopKReverseKL(2)),
        (2.0, StudentTopKReverseKL(1)),
    ),
)
"""Whose gradient is that of their value."""
OBJECTIVES: tuple[Objective, ...] = (
    *PRIMITIVES,
    SampledReverseKL("k1"),
    Mixture((0.5, SampledReverseKL("k1")), (1.0, ForwardKL())),
)

Sampled = Literal["inside", "outside", "any", "none"]


@dataclass(frozen=True)
class Case:
    logits: Tensor
    """[T, V] float64, the student's."""
    teacher: Tensor
    """[T, V] float64 log-probabilities."""
    scores: TeacherScores
    """Of ``teacher``."""


def make_scores(
    teacher: Tensor,
    top_k: int,
    *,
    student: Tensor | None = None,
    sampled: Sampled = "any",
    num_padded: int = 0,
    seed: int = 0,
) -> TeacherScores:
    """The scores that a teacher with these log-probabilities [T, V] gives; the last ``num_padded`` ids are −1.

    Args:
        student: [T, V] logits of whom the (up to) three largest are scored as well, named for every other seed.
    """
    random = torch.Generator().manual_seed(seed)
    num_rows, vocab_size = teacher.shape
    ranked = teacher.argsort(dim=1, descending=True)
    low, high = {"inside": (0, top_k), "outside": (min(top_k, vocab_size - 1), vocab_size)}.get(
        sampled, (0, vocab_size)
    )
    ranks = torch.randint(low, high, (num_rows, 1), generator=random)
    sampled_ids = ranked.gather(1, ranks)
    top_ids = ranked[:, :top_k].clone()
    top_logprobs = teacher.gather(1, top_ids)
    if num_padded:
        top_ids[:, top_k - num_padded :] = -1
        top_logprobs[:, top_k - num_padded :] = 7.0  # never to be read
    extra_ids = None if student is None else student.topk(min(3, vocab_size), dim=1).indices
    missing = 0 if extra_ids is None else 3 - extra_ids.shape[1]
    return TeacherScores(
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        sampled_ids=torch.full((num_rows,), -1) if sampled == "none" else sampled_ids.squeeze(1),
        sampled_logprobs=teacher.gather(1, sampled_ids).squeeze(1),
        extra_logprobs=None if extra_ids is None else pad(teacher.gather(1, extra_ids), (0, missing)),
        extra_ids=None if extra_ids is None or seed % 2 else pad(extra_ids, (0, missing), value=-1),
    )


def make_case(
    *,
    num_rows: int = 3,
    vocab_size: int = 11,
    top_k: int = 4,
    sampled: Sampled = "any",
    num_padded: int = 0,
    num_masked: int = 0,
    scale: float = 2.0,
    seed: int = 0,
) -> Case:
    """``num_masked``: last columns of the vocabulary that are −inf in both models."""
    random = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(num_rows, vocab_size, dtype=torch.float64, generator=random)
    teacher = scale * torch.randn(num_rows, vocab_size, dtype=torch.float64, generator=random)
    if num_masked:
        logits[:, -num_masked:] = teacher[:, -num_masked:] = -torch.inf
    teacher = teacher.log_softmax(dim=1)
    scores = make_scores(teacher, top_k, student=logits, sampled=sampled, num_padded=num_padded, seed=seed)
    return Case(logits=logits, teacher=teacher, scores=scores)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    vocab_size = draw(st.integers(2, 12))
    top_k = draw(st.integers(1, vocab_size))
    return make_case(
        num_rows=draw(st.integers(1, 4)),
        vocab_size=vocab_size,
        top_k=top_k,
        sampled=draw(st.sampled_from(("inside", "outside", "any", "none"))),
        num_padded=draw(st.integers(0, top_k)),
        num_masked=draw(st.integers(0, vocab_size - 1)),
        scale=draw(st.sampled_from((1e-9, 0.01, 1.0, 5.0, 100.0))),
        seed=draw(st.integers(0, 2**31)),
    )


@dataclass
class LargestRows(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the full-vocabulary rows of the largest tensor that any operation makes."""

    vocab_size: int
    num_rows: int = field(default=0)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.t.default:  # a transposed head, which is only a view
            return result
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[1] == self.vocab_size:
                self.num_rows = max(self.num_rows, tensor.shape[0])
        return result
