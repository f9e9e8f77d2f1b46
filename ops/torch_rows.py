"""The row kernel in plain torch: any device, and the one for CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ops.rows import Reduced

_CHUNK = 64
"""Columns that share one maximum."""


class TorchRows:
    """Simple and right; works on a copy of the rows in the working dtype."""

    def reduce(self, logits: Tensor, ids: Tensor, *, num_columns: int, k: int) -> Reduced:
        z = logits[:, :num_columns].to(torch.float64 if logits.dtype == torch.float64 else torch.float32, copy=True)
        support_logits = z.gather(1, ids.clamp(min=0)).masked_fill_(ids < 0, -torch.inf)
        _hide(z, ids)
        tail_max = z.amax(dim=1)
        largest = z.topk(min(k, num_columns), dim=1).values
        largest = torch.nn.functional.pad(largest, (0, k - largest.shape[1]), value=-torch.inf)
        z.sub_(tail_max.masked_fill(tail_max == -torch.inf, 0.0).unsqueeze(1)).exp_()
        return Reduced(support_logits=support_logits, tail_max=tail_max, tail_sum=z.sum(dim=1), largest=largest)

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
        z = logits[:, :num_columns].to(tail_shift.dtype)
        gradient = z.sub(tail_shift.unsqueeze(1)).exp_().mul_(tail_scale.unsqueeze(1))
        _hide(gradient, ids, fill=support_gradient)
        out[:, :num_columns].copy_(gradient)
        out[:, num_columns:].zero_()


def _hide(z: Tensor, ids: Tensor, fill: Tensor | None = None) -> None:
    """z[b, ids[b, c]] = fill[b, c] (−inf when None), leaving alone what −1 would point at."""
    rows, columns = (ids >= 0).nonzero(as_tuple=True)
    z[rows, ids[rows, columns]] = -torch.inf if fill is None else fill[rows, columns]
