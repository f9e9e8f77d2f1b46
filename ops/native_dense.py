"""A teacher's logits on CPU, for a plain objective of one rank: a few passes in C over rows that lie in the cache.

``ops.dense`` says what is computed, and does it where this file does not: mixtures, shards, float64. In torch's own
operations a row of 32,000 takes some 3 ms of one core, here 0.2, backward pass included. How is in ``native_dense.c``;
here is who calls it, and whether it can be trusted on this machine.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from ops.dense import Dense
from ops.formulas import Kind, formula_of
from ops.native_library import floats, native_library
from ops.objectives import JSD, ForwardKL, Objective, Plain, ReverseKL, SkewKL
from ops.shards import Shard
from ops.solve import Conditions
from ops.solved import METRICS, Problem, Solved, check_version, version_of
from ops.threads import on_threads

_log = logging.getLogger(__name__)
DTYPES = (torch.float32, torch.bfloat16)
"""Of either model."""

_FOUND = (
    "value", "weight", "is_there", "teacher_entropy", "student_entropy", "student_lse", "student_shift", "student_log",
    "teacher_shift", "teacher_log", "floor",
)  # fmt: skip
"""Of a row, in the order of ``native_dense.c``."""
_PER_MS = 5e5
"""Columns that a thread gets done in a millisecond."""


class _Asked(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("share", "log_share", "log_rest", "log_floor", "temperature")),
    )


class _Pair(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_rows", "num_columns")),
        *((name, ctypes.c_void_p) for name in ("student", "teacher")),
        *(
            (name, ctypes.c_int64)
            for name in ("student_stride", "teacher_stride", "student_is_bf16", "teacher_is_bf16")
        ),
    )


class NativeDense(Problem):
    """What ``ops.dense.Dense`` is, of ``DTYPES``."""

    def __init__(
        self,
        library: ctypes.CDLL,
        objective: Objective,
        teacher: Tensor,
        shard: Shard,
        conditions: Conditions,
        *,
        sampled_ids: Tensor | None = None,
    ) -> None:
        assert isinstance(objective, get_args(Plain))
        super().__init__(num_columns=shard.num_columns)
        self._library, self._conditions, self._sampled_ids = library, conditions, sampled_ids
        self._teacher = _with_contiguous_rows(teacher)
        formula = formula_of(objective)
        self._asked = _Asked(
            kind=formula.kind,
            share=formula.share,
            log_share=formula.log_share,
            log_rest=formula.log_rest,
            log_floor=-torch.inf if formula.kind != Kind.REVERSE or formula.log_floor is None else formula.log_floor,
            temperature=conditions.temperature,
        )

    def solve(self, logits: Tensor, start: int, end: int) -> NativeDenseRows:
        teacher = self._teacher[start:end]
        found = torch.empty((end - start, len(_FOUND)), dtype=torch.float64, device="cpu")

        def work(first: int, last: int) -> None:
            pair, scratch = self._pair(logits, teacher, first, last)
            self._library.dense_sums(self._asked, pair, _at(found, first), scratch.data_ptr())

        on_threads(work, len(found), found.shape[0] * self.num_columns / _PER_MS)
        named = dict(zip(_FOUND, found.unbind(1), strict=True))
        is_there = named["is_there"]
        conditions = self._conditions.rows(start, end)
        row_scale = is_there.unsqueeze(1) / conditions.temperature
        values, row_scale = conditions.apply(named["value"] * is_there, row_scale)
        metrics = dict.fromkeys(METRICS, torch.zeros_like(is_there))
        metrics |= {"teacher_mass": is_there, "student_mass": is_there, "topk_overlap": is_there}
        metrics |= {name: named[name] for name in ("teacher_entropy", "student_entropy")}
        if self._sampled_ids is not None:
            ids = self._sampled_ids[start:end].long()
            sampled = logits.gather(1, ids.clamp(min=0).unsqueeze(1)).squeeze(1).double()
            metrics["student_logprob"] = (sampled - named["student_lse"]).masked_fill(ids < 0, 0.0)
        return NativeDenseRows(
            values=values,
            metrics=metrics,
            problem=self,
            teacher=teacher,
            teacher_version=version_of(teacher),
            found=found,
            row_scale=row_scale.squeeze(1),
        )

    def write(self, out: Tensor, logits: Tensor, teacher: Tensor, found: Tensor, row_scale: Tensor) -> None:
        row_scale = row_scale.double().contiguous()

        def work(first: int, last: int) -> None:
            pair, scratch = self._pair(logits, teacher, first, last)
            self._library.dense_gradient(
                self._asked, pair, _at(found, first), _at(row_scale, first), _at(out, first), out.stride(0),
                out.shape[1], scratch.data_ptr(),
            )  # fmt: skip

        on_threads(work, len(found), found.shape[0] * self.num_columns / _PER_MS)

    def _pair(self, logits: Tensor, teacher: Tensor, first: int, last: int) -> tuple[_Pair, Tensor]:
        """Rows [first, last) of both, and room to work in."""
        pair = _Pair(
            num_rows=last - first,
            num_columns=self.num_columns,
            student=_at(logits, first),
            teacher=_at(teacher, first),
            student_stride=logits.stride(0),
            teacher_stride=teacher.stride(0),
            student_is_bf16=logits.dtype == torch.bfloat16,
            teacher_is_bf16=teacher.dtype == torch.bfloat16,
        )
        return pair, floats(self._library.dense_scratch_floats(self.num_columns))


@dataclass(frozen=True, eq=False)
class NativeDenseRows(Solved):
    """Rows of which both models are read again for the gradient."""

    problem: NativeDense
    teacher: Tensor
    teacher_version: int | None
    found: Tensor
    """[B, |_FOUND|] float64."""
    row_scale: Tensor
    """[B] float64."""

    def write(self, out: Tensor, logits: Tensor, scale: Tensor | None = None) -> None:
        check_version(self.teacher, self.teacher_version)
        row_scale = self.row_scale if scale is None else self.row_scale * scale
        self.problem.write(out, logits, self.teacher, self.found, row_scale)


DenseMaker = Callable[..., NativeDense]


@functools.cache
def native_dense() -> DenseMaker | None:
    """Makes the problem; or None where there is no library or it is wrong about a probe, and the log says why."""
    library = native_library()
    if library is None:
        return None
    library.dense_scratch_floats.argtypes, library.dense_scratch_floats.restype = [ctypes.c_int64], ctypes.c_int64
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    models: list[Any] = [ctypes.POINTER(_Asked), ctypes.POINTER(_Pair)]
    library.dense_sums.restype = library.dense_gradient.restype = None
    library.dense_sums.argtypes = [*models, pointer, pointer]
    library.dense_gradient.argtypes = [*models, *[pointer] * 3, number, number, pointer]
    make = functools.partial(NativeDense, library)
    if not all(_agrees(make, objective) for objective in (ForwardKL(), ReverseKL(), JSD(0.3), SkewKL(0.1))):
        _log.warning("a teacher's logits are left to plain torch: %s computes another result", library._name)
        return None
    return make


def _agrees(make: DenseMaker, objective: Plain) -> bool:
    """With torch, on a few rows of which some are far apart and some are masked."""
    random = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 3, 1000, generator=random, dtype=torch.float32, device="cpu")
    for x in (logits, teacher):
        x[1] *= 3.0
        x[2] *= 20.0
    logits[1, 100:120] = teacher[1, 110:150] = -torch.inf
    shard = Shard(start=0, num_columns=999, vocab_size=999)
    results = []
    for problem in (
        make(objective, teacher, shard, Conditions()),
        Dense(objective, teacher.double(), shard, Conditions(), block_rows=3),
    ):
        z = logits if isinstance(problem, NativeDense) else logits.double()
        solved, out = problem.solve(z, 0, 3), torch.full_like(z, torch.nan)
        solved.write(out, z)
        results.append((solved.values.double(), out.double()))
    (values, gradient), (their_values, their_gradient) = results
    return torch.allclose(values, their_values, rtol=1e-4, atol=1e-5) and torch.allclose(
        gradient, their_gradient, rtol=1e-4, atol=1e-5
    )


def _with_contiguous_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.shape[1] < 2 or tensor.stride(1) == 1 else tensor.contiguous()


def _at(tensor: Tensor, row: int) -> int:
    return tensor.data_ptr() + row * tensor.stride(0) * tensor.element_size()
