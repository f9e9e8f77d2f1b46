"""How many numbers of a row are larger than some others: by comparing each with each, or by sorting."""

from __future__ import annotations

import torch
from torch import Tensor

from ops.native_rows import native_rows

_FEW = 1024
"""Numbers of a row beyond which sorting them is faster than comparing each with each."""


def count_larger(numbers: Tensor, bounds: Tensor) -> Tensor:
    """[B, C] int64: of the numbers [B, N], those larger than each of the bounds [B, C], which are of the same dtype."""
    if numbers.device.type == "cpu" and numbers.dtype == torch.float32 and numbers.shape[1] <= _FEW:
        native = native_rows()
        if native is not None:
            return native.count_larger(numbers, bounds)
    ascending = numbers.sort(dim=1).values
    return ascending.shape[1] - torch.searchsorted(ascending, bounds.contiguous(), right=True)
