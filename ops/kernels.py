"""Which kernel does the work on whole rows: decided by device, here and nowhere else."""

from __future__ import annotations

import functools
import importlib.util

import torch

from ops.rows import RowKernel
from ops.torch_rows import TorchRows


def kernel_for(device: torch.device) -> RowKernel:
    """A kernel for one call: Triton's where there is a CUDA device and triton, plain torch elsewhere."""
    if device.type == "cuda" and _has_triton():
        from ops.triton_rows import TritonRows

        kernel: RowKernel = TritonRows()
        return kernel
    return TorchRows()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
