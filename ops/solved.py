"""What becomes of a block of rows: values, metrics, and whatever it takes to write the gradient."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

METRICS = ("teacher_mass", "student_mass", "topk_overlap", "teacher_entropy", "student_entropy", "student_logprob")


@dataclass(frozen=True, eq=False)
class Solved(ABC):
    """B rows: a few numbers for each, from which the gradient can be written when the logits are at hand."""

    values: Tensor
    """[B] nats, working dtype or float64."""
    metrics: dict[str, Tensor]
    """[B] for each of ``METRICS``, likewise; see ``ops.divergence.Divergence``."""

    @abstractmethod
    def write(self, out: Tensor, logits: Tensor, scale: Tensor | None = None) -> None:
        """``out`` [B, W], which may be the same storage as ``logits``, gets the gradient of Σ scale · values.

        Args:
            logits: [B, W] the rows as they were.
            scale: [B]; None: 1.
        """


@dataclass(frozen=True, eq=False)
class Solution:
    """An objective on the few columns of B rows; all of one dtype, the working one or float64."""

    values: Tensor
    """[B] nats."""
    metrics: dict[str, Tensor]
    """[B] for each of ``METRICS``."""
    tail_shift: Tensor
    tail_scale: Tensor
    support_gradient: Tensor
    """What ``ops.rows.RowKernel.expand`` makes the gradient of."""


class Problem(ABC):
    """An objective, a teacher's view of T rows, and all that is asked besides."""

    def __init__(self, *, num_columns: int) -> None:
        self.num_columns = num_columns
        """Of a row of this rank's logits, those that exist."""

    @abstractmethod
    def solve(self, logits: Tensor, start: int, end: int) -> Solved:
        """Rows [start, end), whose logits [B, W] are given. Every rank of a group must solve the same rows."""


def version_of(tensor: Tensor) -> int | None:
    """Counts modifications; those of a tensor made in inference mode are not counted."""
    return None if tensor.is_inference() else tensor._version


def check_version(teacher: Tensor, version: int | None) -> None:
    if version_of(teacher) != version:
        raise RuntimeError(
            "the teacher's logits were modified between forward and backward, which reads them again; "
            "clone them, or modify them later"
        )


class Columns:
    """Collects [B] results of the blocks into [T] tensors."""

    def __init__(self, num_rows: int, like: Tensor) -> None:
        dtype = working_dtype(like)
        self.values = torch.empty(num_rows, dtype=dtype, device=like.device)
        self.metrics = {name: torch.empty_like(self.values) for name in METRICS}

    @classmethod
    def of(cls, solved: Solved, like: Tensor) -> Columns:
        """Of one block that is all rows: nothing to collect."""
        columns, dtype = cls(0, like), working_dtype(like)
        columns.values = solved.values.to(dtype)
        columns.metrics = {name: solved.metrics[name].to(dtype) for name in METRICS}
        return columns

    def put(self, start: int, end: int, solved: Solved) -> None:
        self.values[start:end] = solved.values
        for name, metric in solved.metrics.items():
            self.metrics[name][start:end] = metric


def working_dtype(tensor: Tensor) -> torch.dtype:
    """float32 from 8 or 11 significant bits up: too few to sum a vocabulary."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


_STEP = 16
"""Rows: products of a multiple are faster than those of one row more or less."""


def blocks(num_rows: int, block_rows: int) -> Iterator[tuple[int, int]]:
    """[start, end) of ceil(T / block_rows) blocks, as even as can be, as a short one takes nearly the time of a long
    one; but multiples of 16 rows where these fit."""
    num_blocks = math.ceil(num_rows / block_rows)
    fits = num_blocks * (block_rows // _STEP) >= math.ceil(num_rows / _STEP)
    step = _STEP if fits else 1
    num_steps = math.ceil(num_rows / step)
    ends = [min(num_steps * i // num_blocks * step, num_rows) for i in range(1, num_blocks + 1)]
    return zip([0, *ends], ends, strict=False)


def largest_block(num_rows: int, block_rows: int) -> int:
    """Rows of the largest of ``blocks``."""
    return max((end - start for start, end in blocks(num_rows, block_rows)), default=0)
