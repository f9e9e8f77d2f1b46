"""Which kernel does the work on whole rows: decided by device, here and nowhere else."""

from __future__ import annotations

import functools
import importlib.util

import torch

from ops.rows import RowKernel
from ops.torch_rows import TorchRows


def kernel_for(device: torch.device, *, kept_rows: int) -> RowKernel:
    """A kernel for one call: Triton's where there is a CUDA device and triton, plain torch elsewhere.

    Args:
        kept_rows: of how many rows the kernel may keep a copy from ``reduce`` to ``expand``.
    """
    if device.type == "cuda" and _has_triton():
        from ops.triton_rows import TritonRows  # type: ignore[import-not-found, unused-ignore]

        kernel: RowKernel = TritonRows()
        return kernel
    return TorchRows(kept_rows)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None and importlib.util.find_spec("ops.triton_rows") is not None
