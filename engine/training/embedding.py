"""An input embedding whose backward pass touches only the rows that were looked up.

torch's own makes a dense [V, D] gradient, mostly zeros, and adds it to the accumulated one: for 49,152 × 576 that is
three passes over 113 MB for a few hundred rows. Worth it on CPU; on a GPU the dense one is cheap and deterministic.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn


class RowGradEmbedding(nn.Embedding):
    """Adds the gradient of its rows to ``weight.grad``, which must be there, and tells autograd of no gradient for
    ``weight``. As with ``nn.Embedding``, ``padding_idx`` gets none."""

    @classmethod
    def sharing(cls, embedding: nn.Embedding) -> RowGradEmbedding:
        """A replacement that holds the same parameter, so a head that is tied to it stays tied."""
        rows, width, weight = embedding.num_embeddings, embedding.embedding_dim, embedding.weight
        replacement = cls(rows, width, padding_idx=embedding.padding_idx, _weight=weight)
        replacement.weight = weight  # the constructor wraps it in a new Parameter
        return replacement

    @staticmethod
    def can_replace(embedding: nn.Module) -> TypeGuard[nn.Embedding]:
        """Whether the module is a plain embedding: subclasses do more, and the options change the gradient."""
        return (
            type(embedding) is nn.Embedding
            and embedding.max_norm is None
            and not embedding.scale_grad_by_freq
            and not embedding.sparse
        )

    def forward(self, input: Tensor) -> Tensor:
        rows: Tensor = _Lookup.apply(self.weight, input, self.padding_idx)  # type: ignore[no-untyped-call]
        return rows


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
        ctx.weight, ctx.padding_idx = weight, padding_idx
        ctx.save_for_backward(ids)
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        flat = ids.reshape(-1)
        if ctx.padding_idx is not None:
            kept = flat != ctx.padding_idx
            flat, rows = flat[kept], rows[kept]
        ctx.weight.grad.index_add_(0, flat, rows.to(ctx.weight.grad.dtype))
        return None, None, None
