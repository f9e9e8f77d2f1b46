"""A teacher's logits on CUDA, for a plain objective of one rank: three passes over both models, no [B, V] between them.

``ops.dense`` says what is computed, and does it where this file does not: mixtures, shards, float64. In torch's own
operations that takes some thirty [B, V] tensors, 70 to 95 ms of an H100 at 2048×151936.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
import triton
from torch import Tensor

from ops.formulas import formula_of
from ops.objectives import Objective, Plain
from ops.shards import Shard
from ops.solve import Conditions
from ops.solved import METRICS, Problem, Solved, check_version, version_of
from ops.triton_dense_kernels import NUM_SEQUENCES, NUM_SUMS, dense_gradient, dense_statistics, dense_sums
from ops.triton_rows import num_processors, splits

_CHUNK = 64
_STATISTICS_BLOCK, _STATISTICS_WARPS = 1024, 2
_BLOCK, _WARPS = 1024, 4
"""Eight columns per thread: 16 bytes of two-byte logits, and room for some twenty numbers of each in registers."""
_PROGRAMS_PER_PROCESSOR = 128


class TritonDense(Problem):
    """What ``ops.dense.Dense`` is, with logits of at most 32 bits."""

    def __init__(self, objective: Objective, teacher: Tensor, shard: Shard, conditions: Conditions) -> None:
        assert isinstance(objective, get_args(Plain))
        super().__init__(num_columns=shard.num_columns)
        self._conditions = conditions
        self._teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
        self._formula = formula_of(objective).constants()
        self._formula["TEMPERATURE"] = float(conditions.temperature)

    def solve(self, logits: Tensor, start: int, end: int) -> TritonDenseRows:
        teacher, num_rows = self._teacher[start:end], end - start
        models = (logits, logits.stride(0), teacher, teacher.stride(0), self.num_columns, logits.shape[1])
        num_programs = _PROGRAMS_PER_PROCESSOR * num_processors(logits.device)

        def of_rows(num_splits: int, *shape: int) -> Tensor:
            return torch.empty((num_rows, *shape, num_splits), dtype=torch.float32, device=logits.device)

        num_splits, blocks_per_split = splits(num_rows, self.num_columns, _STATISTICS_BLOCK, num_programs)
        statistics = of_rows(num_splits, NUM_SEQUENCES.value, 2)
        if num_rows:
            dense_statistics[(num_rows * num_splits,)](
                *models,
                statistics,
                num_splits,
                blocks_per_split,
                TEMPERATURE=self._formula["TEMPERATURE"],
                NEEDS_FLOOR=self._formula["LOG_FLOOR"] is not None,
                CHUNKS=_STATISTICS_BLOCK // _CHUNK,
                CHUNK=_CHUNK,
                num_warps=_STATISTICS_WARPS,
            )
        num_sums, blocks_per_split = splits(num_rows, self.num_columns, _BLOCK, num_programs)
        sums = of_rows(num_sums, NUM_SUMS.value)
        if num_rows:
            dense_sums[(num_rows * num_sums,)](
                *models,
                statistics,
                num_splits,
                sums,
                num_sums,
                blocks_per_split,
                **self._formula,
                BLOCK=_BLOCK,
                STATISTICS=triton.next_power_of_2(num_splits),
                num_warps=_WARPS,
            )
        value, weight, total, teacher_entropy, student_entropy = sums.sum(dim=2, dtype=torch.float64).unbind(1)
        values, row_scale = self._conditions.rows(start, end).apply(value, torch.ones_like(value).unsqueeze(1))
        is_there = (total > 0.0).double()
        metrics = dict.fromkeys(METRICS, torch.zeros_like(is_there))
        metrics |= {"teacher_mass": is_there, "student_mass": is_there, "topk_overlap": is_there}
        metrics |= {"teacher_entropy": teacher_entropy, "student_entropy": student_entropy}
        return TritonDenseRows(
            values=values,
            metrics=metrics,
            teacher=teacher,
            teacher_version=version_of(teacher),
            num_columns=self.num_columns,
            formula=self._formula,
            statistics=statistics,
            # Divided by Σq, which is 1 but for rounding: so the gradient's sum vanishes to the last digit.
            mean=weight / total.clamp(min=0.5),
            row_scale=row_scale.squeeze(1) / self._conditions.temperature,
        )


@dataclass(frozen=True, eq=False)
class TritonDenseRows(Solved):
    """Rows of which both models are read again for the gradient."""

    teacher: Tensor
    teacher_version: int | None
    num_columns: int
    formula: dict[str, Any]
    statistics: Tensor
    mean: Tensor
    row_scale: Tensor

    def write(self, out: Tensor, logits: Tensor, scale: Tensor | None = None) -> None:
        teacher = self.teacher
        check_version(teacher, self.teacher_version)
        num_rows, width = logits.shape
        if num_rows == 0:
            return
        num_programs = _PROGRAMS_PER_PROCESSOR * num_processors(logits.device)
        num_splits, blocks_per_split = splits(num_rows, width, _BLOCK, num_programs)
        row_scale = self.row_scale if scale is None else self.row_scale * scale
        num_statistics = self.statistics.shape[-1]
        dense_gradient[(num_rows * num_splits,)](
            out,
            out.stride(0),
            logits,
            logits.stride(0),
            teacher,
            teacher.stride(0),
            self.num_columns,
            width,
            self.statistics,
            num_statistics,
            self.mean.float(),
            row_scale.float(),
            num_splits,
            blocks_per_split,
            **self.formula,
            BLOCK=_BLOCK,
            STATISTICS=triton.next_power_of_2(num_statistics),
            num_warps=_WARPS,
        )
