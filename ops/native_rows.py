"""The row kernel in C, for float32 and bfloat16 on CPU; other dtypes go to the one in plain torch.

A few passes over a row that lies in the second-level cache, a vector of numbers at a time, in place of torch's passes
over tensors. What is computed and how is in ``native_rows.c``; here is who calls it, on which threads, and whether it
can be had and trusted on this machine.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ops.native_library import floats, native_library
from ops.rows import Reduced
from ops.threads import on_threads
from ops.torch_rows import TorchRows

_log = logging.getLogger(__name__)
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
_PER_MS = 2e6
"""Logits that a thread gets done in a millisecond."""


class NativeRows:
    """Rows are split over ``torch.get_num_threads()`` threads, which live for one call."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._torch = TorchRows()

    def reduce(self, logits: Tensor, ids: Tensor, *, num_columns: int, k: int) -> Reduced:
        if logits.dtype not in _SUFFIX:
            return self._torch.reduce(logits, ids, num_columns=num_columns, k=k)
        num_rows, num_ids = ids.shape
        ids = ids.contiguous()
        support_logits, largest = floats(num_rows, num_ids), floats(num_rows, k)
        tail_max, tail_sum = floats(2, num_rows)
        function = self._function("reduce", logits)
        room = self._library.reduce_scratch_floats(num_columns, num_ids)

        def work(start: int, end: int) -> None:
            scratch = floats(room)
            function(
                _at(logits, start), logits.stride(0), end - start, num_columns, _at(ids, start), num_ids, k,
                _at(support_logits, start), _at(tail_max, start), _at(tail_sum, start), _at(largest, start),
                scratch.data_ptr(),
            )  # fmt: skip

        on_threads(work, num_rows, num_rows * num_columns / _PER_MS)
        return Reduced(support_logits=support_logits, tail_max=tail_max, tail_sum=tail_sum, largest=largest)

    def expand(
        self,
        out: Tensor,
        logits: Tensor,
        ids: Tensor,
        *,
        num_columns: int,
        tail_shift: Tensor,
        tail_scale: Tensor,
        support_gradient: Tensor,
    ) -> None:
        if logits.dtype not in _SUFFIX:
            self._torch.expand(
                out,
                logits,
                ids,
                num_columns=num_columns,
                tail_shift=tail_shift,
                tail_scale=tail_scale,
                support_gradient=support_gradient,
            )
            return
        num_rows, num_ids = ids.shape
        ids, shift, scale = ids.contiguous(), tail_shift.contiguous(), tail_scale.contiguous()
        support = support_gradient.contiguous()
        function = self._function("expand", logits)
        room = self._library.expand_scratch_ints(num_columns, num_ids)

        def work(start: int, end: int) -> None:
            scratch = torch.empty(room, dtype=torch.int32, device="cpu")
            function(
                _at(out, start), out.stride(0), _at(logits, start), logits.stride(0), end - start, num_columns,
                out.shape[1], _at(ids, start), num_ids, _at(shift, start), _at(scale, start), _at(support, start),
                scratch.data_ptr(),
            )  # fmt: skip

        on_threads(work, num_rows, num_rows * num_columns / _PER_MS)

    def count_larger(self, numbers: Tensor, bounds: Tensor) -> Tensor:
        """As ``ops.counting.count_larger``, of float32: every one with every one, which for few beats sorting."""
        numbers, bounds = numbers.contiguous(), bounds.contiguous()
        counts = torch.empty(bounds.shape, dtype=torch.int64, device="cpu")
        self._library.count_larger(
            numbers.data_ptr(), numbers.shape[1], bounds.data_ptr(), bounds.shape[1], len(bounds), counts.data_ptr()
        )
        return counts

    def _function(self, name: str, logits: Tensor) -> Callable[..., None]:
        function: Callable[..., None] = getattr(self._library, f"{name}_{_SUFFIX[logits.dtype]}")
        return function


@functools.cache
def native_rows() -> NativeRows | None:
    """The kernel; or None where there is no library or it is wrong about a probe, and the log says why."""
    library = native_library()
    if library is None:
        return None
    _declare(library)
    kernel = NativeRows(library)
    if not all(_agrees(kernel, dtype) for dtype in _SUFFIX):
        _log.warning("losses on CPU run in plain torch: the compiled kernel %s computes another result", library._name)
        return None
    return kernel


def _declare(library: ctypes.CDLL) -> None:
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    library.reduce_scratch_floats.argtypes, library.reduce_scratch_floats.restype = [number, number], number
    library.expand_scratch_ints.argtypes, library.expand_scratch_ints.restype = [number, number], number
    library.count_larger.restype = None
    library.count_larger.argtypes = [pointer, number, pointer, number, number, pointer]
    for suffix in _SUFFIX.values():
        reduce, expand = getattr(library, f"reduce_{suffix}"), getattr(library, f"expand_{suffix}")
        reduce.restype = expand.restype = None
        reduce.argtypes = [pointer, number, number, number, pointer, number, number, *[pointer] * 5]
        expand.argtypes = [pointer, number, pointer, *[number] * 4, pointer, number, *[pointer] * 4]


def _agrees(kernel: NativeRows, dtype: torch.dtype) -> bool:
    """With torch, on a few rows of which some are far apart and some are masked."""
    random = torch.Generator().manual_seed(0)
    z = torch.randn(4, 3000, generator=random, dtype=torch.float32)
    z *= torch.tensor([[1.0], [3.0], [30.0], [0.0]])
    z[2, 1000:2000] = -torch.inf
    logits = z.to(dtype)
    ids = torch.stack([torch.randperm(2999, generator=random)[:7] for _ in range(4)])
    ids[:, 3] = -1
    mine, other = (k.reduce(logits, ids, num_columns=2999, k=5) for k in (kernel, TorchRows()))
    gradients = []
    for each in (kernel, TorchRows()):
        out = torch.full_like(logits, torch.nan)
        each.expand(
            out,
            logits,
            ids,
            num_columns=2999,
            tail_shift=other.tail_max,
            tail_scale=1.0 / other.tail_sum,
            support_gradient=other.support_logits.masked_fill(ids < 0, 0.0),
        )
        gradients.append(out.float())
    return (
        torch.equal(mine.support_logits, other.support_logits)
        and torch.equal(mine.tail_max, other.tail_max)
        and torch.equal(mine.largest.sort(dim=1).values, other.largest.sort(dim=1).values)
        and torch.allclose(mine.tail_sum, other.tail_sum, rtol=1e-5, atol=0.0)
        and torch.allclose(gradients[0], gradients[1], rtol=2.0**-7 if dtype == torch.bfloat16 else 1e-5, atol=2.0**-30)
    )


def _at(tensor: Tensor, row: int) -> int:
    return tensor.data_ptr() + row * tensor.stride(0) * tensor.element_size()
