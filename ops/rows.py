"""The work on whole rows of logits, and nothing of objectives: what a kernel must do, and which one does it.

    B rows      W columns of this rank      C columns of the support      z logits      tail: all other columns

An objective sees V logits as the C logits of its support and the log-sum-exp of the tail (``ops.coarse``). So a kernel
reads the rows once to *reduce* them to that, and once more to *expand* the gradient of those few numbers into the
gradient of all logits. What lies in between is [B, C]: ``ops.solve`` defines it for all kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Reduced:
    """Rows of logits as an objective sees them. Working dtype: float32, float64 for float64 logits."""

    support_logits: Tensor
    """[B, C]; −inf where the id is −1."""
    tail_max: Tensor
    """[B]: the largest logit of the tail; −inf when the tail is empty."""
    tail_sum: Tensor
    """[B]: Σ exp(z − tail_max) over the tail; 0 when it is empty."""
    largest: Tensor
    """[B, k]: the k largest logits of the tail in any order; −inf where there are fewer. Those that are not among the k
    largest of tail and support together may be missing, with numbers instead that are larger than nothing that is among
    these, and no smaller than the largest that is not."""


class RowKernel(Protocol):
    """No call depends on another one."""

    def reduce(self, logits: Tensor, ids: Tensor, *, num_columns: int, k: int) -> Reduced:
        """Read the rows.

        Args:
            logits: [B, W] any float dtype, each row contiguous. Not changed.
            ids: [B, C] int64 columns of this rank, distinct within a row; −1: none.
            num_columns: columns from here on do not exist, whatever they hold. At least 1.
            k: how many of the largest logits of the tail are wanted; may be 0, may exceed W.
        """
        ...

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
        """Write the gradient of the rows.

        Args:
            out: [B, W] dtype of ``logits``; may be the same storage. Gets tail_scale · exp(z − tail_shift) on the tail,
                ``support_gradient`` at ``ids``, 0 at columns that do not exist.
            tail_shift: [B] working dtype: finite, and no logit of the tail is larger.
            tail_scale: [B] working dtype.
            support_gradient: [B, C] working dtype; not read where the id is −1.
        """
        ...


def no_columns(ids: Tensor, *, k: int, dtype: torch.dtype) -> Reduced:
    """What rows of a rank reduce to that has no columns; kernels are called with one column or more.

    Args:
        ids: [B, C].
    """
    shape = ids.shape[0], ids.shape[1] + 1 + k
    nothing = torch.full(shape, -torch.inf, dtype=dtype, device=ids.device)
    support_logits, tail_max, largest = torch.split(nothing, [ids.shape[1], 1, k], dim=1)
    tail_max = tail_max.squeeze(1)
    return Reduced(support_logits, tail_max=tail_max, tail_sum=torch.zeros_like(tail_max), largest=largest)
