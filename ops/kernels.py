"""Which kernel does the work on whole rows: decided by device, here and nowhere else."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from ops.native_rows import native_rows
from ops.rows import RowKernel
from ops.torch_rows import TorchRows


def kernel_for(device: torch.device) -> RowKernel:
    """A kernel for one call: on CUDA Triton's where there is triton, on CPU the compiled one where it can be built, and
    plain torch elsewhere."""
    if device.type == "cuda" and _has_triton():
        from ops.triton_rows import TritonRows

        kernel: RowKernel = TritonRows()
        return kernel
    native = native_rows() if device.type == "cpu" else None
    return TorchRows() if native is None else native


_FEW = 1024
"""Numbers of a row beyond which sorting them is faster than comparing each with each."""


def count_larger(numbers: Tensor, bounds: Tensor) -> Tensor:
    """[B, C] int64: of the numbers [B, N], those larger than each of the bounds [B, C], which are of the same dtype."""
    if numbers.device.type == "cpu" and numbers.dtype == torch.float32 and numbers.shape[1] <= _FEW:
        native = native_rows()
        if native is not None:
            return native.count_larger(numbers, bounds)
    ascending = numbers.sort(dim=1).values
    return ascending.shape[1] - torch.searchsorted(ascending, bounds, right=True)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
