"""Values, metrics and gradient on few columns by one pass in C, for plain objectives on CPU, where torch makes sixty.

Those took 7 to 10 ms for 1024 rows of 65 columns, a quarter of all that a vocabulary of 32,000 takes.
What is computed and how is in ``native_solve.c``; here is who calls it, and whether it can be trusted on this machine.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
from typing import get_args

import torch
from torch import Tensor

from ops.formulas import formula_of, tail_index
from ops.native_library import native_library
from ops.objectives import JSD, ForwardKL, Objective, Plain, ReverseKL, SkewKL, Tail
from ops.rows import Reduced
from ops.scores import Support, TeacherScores, check_largest_id
from ops.shards import Shard, Whole, combine
from ops.solve import Conditions
from ops.solved import METRICS, Solution
from ops.threads import on_threads
from ops.torch_solve import solve_by_torch

_log = logging.getLogger(__name__)
_PER_MS = 1e5
"""Categories of rows that a thread gets done in a millisecond."""


class _Asked(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", "tail")),
        *(
            (name, ctypes.c_double)
            for name in ("share", "log_share", "log_rest", "log_floor", "temperature", "factor", "clamp")
        ),
    )


class _Rows(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_ids", "num_top")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "support_logits", "tail_shift", "tail_sum", "sampled_logits", "logprobs", "weights", "ids",
                "sampled_ids", "num_larger",
            )
        ),
    )  # fmt: skip


class _Solution(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("values", "metrics", "tail_scale", "support_gradient"))


class NativeSolver:
    """Rows are split over threads (``ops.threads``)."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        number, pointer = ctypes.c_int64, ctypes.c_void_p
        library.list_support.argtypes = [*[pointer] * 4, number, number, pointer, pointer]
        library.list_support.restype = number
        library.solve_rows.restype = None
        library.solve_rows.argtypes = [*map(ctypes.POINTER, (_Asked, _Rows, _Solution)), number, number, pointer]
        library.solve_scratch_doubles.argtypes, library.solve_scratch_doubles.restype = [number], number

    def __call__(
        self,
        objective: Objective,
        reduced: Reduced,
        logits: Tensor,
        support: Support,
        conditions: Conditions,
        shard: Shard,
    ) -> Solution:
        """What ``ops.torch_solve`` computes, in float64 as there.

        Args:
            objective: one that ``has_formula``.
        """
        assert isinstance(objective, get_args(Plain))
        return self._solve(objective, combine(shard, reduced, logits, support), support, conditions)

    def support(self, scores: TeacherScores, *, vocab_size: int) -> Support:
        """As ``ops.scores.support_of``."""
        num_rows, num_top = scores.top_ids.shape
        top_ids, sampled_ids = scores.top_ids.long().contiguous(), scores.sampled_ids.long().contiguous()
        top_logprobs = scores.top_logprobs.double().contiguous()
        sampled_logprobs = scores.sampled_logprobs.double().contiguous()
        ids = torch.empty((num_rows, num_top + 1), dtype=torch.int64, device="cpu")
        logprobs = torch.empty((num_rows, num_top + 1), dtype=torch.float64, device="cpu")
        largest = self._library.list_support(
            top_ids.data_ptr(), top_logprobs.data_ptr(), sampled_ids.data_ptr(), sampled_logprobs.data_ptr(),
            num_rows, num_top, ids.data_ptr(), logprobs.data_ptr(),
        )  # fmt: skip
        check_largest_id(largest, vocab_size)
        return Support(ids=ids, logprobs=logprobs, sampled_ids=sampled_ids, num_top=num_top)

    def _solve(self, objective: Plain, whole: Whole, support: Support, conditions: Conditions) -> Solution:
        num_rows, num_ids = support.ids.shape
        formula, temperature = formula_of(objective), conditions.temperature
        asked = _Asked(
            kind=formula.kind,
            tail=tail_index(objective.tail),
            share=formula.share,
            log_share=formula.log_share,
            log_rest=formula.log_rest,
            log_floor=-math.inf if formula.log_floor is None else formula.log_floor,
            temperature=temperature,
            factor=temperature * temperature if conditions.square_temperature else 1.0,
            clamp=math.inf if conditions.clamp is None else conditions.clamp,
        )
        given = {
            "support_logits": whole.support_logits,
            "tail_shift": whole.tail_shift,
            "tail_sum": whole.tail_sum,
            "sampled_logits": whole.sampled_logits,
            "num_larger": whole.num_larger,
            "logprobs": support.logprobs,
            "ids": support.ids,
            "sampled_ids": support.sampled_ids,
        }
        if conditions.token_weights is not None:
            given["weights"] = conditions.token_weights.double()
        given = {name: tensor.contiguous() for name, tensor in given.items()}  # alive until the end
        rows = _Rows(
            num_ids=num_ids, num_top=support.num_top, **{name: tensor.data_ptr() for name, tensor in given.items()}
        )
        values, metrics, tail_scale, support_gradient = (
            torch.empty(shape, dtype=torch.float64, device="cpu")
            for shape in ((num_rows,), (num_rows, len(METRICS)), (num_rows,), (num_rows, num_ids))
        )
        solution = _Solution(*(tensor.data_ptr() for tensor in (values, metrics, tail_scale, support_gradient)))
        room = self._library.solve_scratch_doubles(num_ids)

        def work(start: int, end: int) -> None:
            scratch = torch.empty(room, dtype=torch.float64, device="cpu")
            self._library.solve_rows(asked, rows, solution, start, end, scratch.data_ptr())

        on_threads(work, num_rows, num_rows * num_ids / _PER_MS)
        return Solution(
            values=values,
            metrics=dict(zip(METRICS, metrics.unbind(dim=1), strict=True)),
            tail_shift=whole.tail_shift,
            tail_scale=tail_scale,
            support_gradient=support_gradient,
        )


@functools.cache
def native_solver() -> NativeSolver | None:
    """The solver; or None where there is no library or it is wrong about a probe, and the log says why."""
    library = native_library()
    if library is None:
        return None
    solver = NativeSolver(library)
    probes: list[Plain] = [
        objective
        for tail in get_args(Tail)
        for objective in (
            ForwardKL(tail),
            ReverseKL(tail),
            JSD(0.3, tail),
            SkewKL(0.1, tail=tail),
            SkewKL(0.1, reverse=True, tail=tail),
        )
    ]
    if not all(_agrees(solver, objective) for objective in probes):
        _log.warning(
            "losses on CPU solve in plain torch: the compiled kernel %s computes another result", library._name
        )
        return None
    return solver


def _agrees(solver: NativeSolver, objective: Plain) -> bool:
    """With torch, on a few rows of which some are far from the teacher and one has no tail."""
    random = torch.Generator().manual_seed(0)
    num_rows, num_ids = 4, 10
    z, logprobs = torch.randn(2, num_rows, num_ids + 1, generator=random, dtype=torch.float64)
    z *= torch.tensor([[0.1], [1.0], [10.0], [1.0]])
    support_logits = z[:, :-1].contiguous()
    reduced = Reduced(
        support_logits=support_logits,
        tail_max=z[:, -1],
        tail_sum=torch.tensor([1.0, 3.0, 2.0, 0.0], dtype=torch.float64),
        largest=z[:, -1:],
    )
    support = Support(
        ids=torch.arange(num_ids).repeat(num_rows, 1),
        logprobs=logprobs.log_softmax(dim=1)[:, :-1],
        sampled_ids=torch.full((num_rows,), num_ids - 1),
        num_top=num_ids - 1,
    )
    conditions = Conditions(temperature=1.5, clamp=5.0, token_weights=torch.linspace(0.5, 2.0, num_rows))
    shard = Shard(start=0, num_columns=num_ids, vocab_size=num_ids)
    mine, other = (
        solve(objective, reduced, support_logits, support, conditions, shard) for solve in (solver, solve_by_torch)
    )
    return all(
        torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
        for found, expected in (
            (mine.values, other.values),
            (mine.tail_scale, other.tail_scale),
            (mine.support_gradient, other.support_gradient),
            *((mine.metrics[name], other.metrics[name]) for name in METRICS),
        )
    )
