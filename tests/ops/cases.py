"""Random teachers and students for the tests of ``ops``, small enough for float64 and for gradcheck."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ops import ForwardKL, Objective, ReverseKL, TeacherScores

OBJECTIVES: tuple[Objective, ...] = tuple(
    kind(tail) for kind in (ForwardKL, ReverseKL) for tail in ("bucket", "renormalise", "ignore")
)
DIVERGENCES = tuple(objective for objective in OBJECTIVES if objective.tail != "ignore")

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
    teacher: Tensor, top_k: int, *, sampled: Sampled = "any", num_padded: int = 0, seed: int = 0
) -> TeacherScores:
    """The scores that a teacher with these log-probabilities [T, V] gives; the last ``num_padded`` ids are −1."""
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
    return TeacherScores(
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        sampled_ids=torch.full((num_rows,), -1) if sampled == "none" else sampled_ids.squeeze(1),
        sampled_logprobs=teacher.gather(1, sampled_ids).squeeze(1),
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
    scores = make_scores(teacher, top_k, sampled=sampled, num_padded=num_padded, seed=seed)
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
