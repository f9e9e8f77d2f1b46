"""Which kernel does the work on whole rows: decided by device, here and nowhere else."""

from __future__ import annotations

import functools
import importlib.util

import torch

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


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
