"""Attention over a packed batch, branch by branch: what a mask would hide is not computed at all.

    N rows of the trie      S segments: maximal runs of rows without a branching      H heads      E width of a head

With a [N, N] mask every row is multiplied with every other, though it attends only to the branch that it ends: at
N = 4,096 that is more arithmetic than the rest of a small model. Here each segment attends to its ancestor segments and
to itself; no mask larger than one segment exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from engine.training.packing import PackedBatch

NAME = "distillation_tree"
"""Under this name transformers finds ``tree_attention``."""


@dataclass(frozen=True, eq=False)
class Segment:
    start: int
    end: int
    """Rows [start, end)."""
    ancestors: tuple[int, ...]
    """Segments from the root down to the parent."""
    mask: Tensor | None
    """[end − start, keys] bool over ancestors and self; None: causal at the root, everything for a single row."""


@dataclass(frozen=True, eq=False)
class Tree:
    segments: tuple[Segment, ...]
    """In the order of the rows, covering all of them."""

    @property
    def lengths(self) -> list[int]:
        return [segment.end - segment.start for segment in self.segments]


def tree_of(batch: PackedBatch, *, device: torch.device) -> Tree:
    """Cut the trie where it branches."""
    parent, end = batch.parent, batch.end
    starts = [r for r in range(batch.num_tokens) if r == 0 or parent[r] != r - 1 or end[r - 1] != end[r]]
    segments: list[Segment] = []
    segment_of_row: dict[int, int] = {-1: -1}  # of the last row of each segment: the only ones that have branches
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], batch.num_tokens], strict=True)):
        above = segment_of_row[int(parent[start])]
        ancestors = () if above < 0 else (*segments[above].ancestors, above)
        num_above = sum(segments[i].end - segments[i].start for i in ancestors)
        segments.append(
            Segment(start=start, end=stop, ancestors=ancestors, mask=_mask(stop - start, num_above, device))
        )
        segment_of_row[stop - 1] = number
    return Tree(segments=tuple(segments))


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree: Tree | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers; models hand ``tree`` down from the arguments of their forward pass.

    Args:
        query: [1, H, N, E].
        key, value: [1, H or fewer, N, E].
        tree: None: plain causal attention.

    Returns:
        [1, N, H, E].
    """
    if tree is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return plain
    if query.dtype in (torch.bfloat16, torch.float16) and query.requires_grad and query.device.type == "cpu":
        # torch's backward pass in half precision on CPU: 8 segments of 57 rows took 22 ms a layer, in float32 9.
        with torch.autocast("cpu", enabled=False):  # it would narrow them again
            wide = _by_segment(query.float(), key.float(), value.float(), tree, scaling)
        return wide.to(query.dtype).transpose(1, 2), None
    return _by_segment(query, key, value, tree, scaling).transpose(1, 2), None


def _by_segment(query: Tensor, key: Tensor, value: Tensor, tree: Tree, scaling: float | None) -> Tensor:
    """[1, H, N, E]"""
    num_groups, lengths = query.shape[1] // key.shape[1], tree.lengths
    # One split per tensor: its backward pass is one cat, where slices would each fill a whole gradient with zeros.
    queries = torch.split(query, lengths, dim=2)
    keys = torch.split(repeat_kv(key, num_groups), lengths, dim=2)
    values = torch.split(repeat_kv(value, num_groups), lengths, dim=2)
    outputs = []
    for number, segment in enumerate(tree.segments):
        path = (*segment.ancestors, number)
        outputs.append(
            scaled_dot_product_attention(
                queries[number],
                _joined([keys[i] for i in path]),
                _joined([values[i] for i in path]),
                attn_mask=segment.mask,
                is_causal=not segment.ancestors,
                scale=scaling,
            )
        )
    return torch.cat(outputs, dim=2)


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _mask(num_rows: int, num_above: int, device: torch.device) -> Tensor | None:
    if num_above == 0 or num_rows == 1:
        return None
    mask = torch.ones(num_rows, num_above + num_rows, dtype=torch.bool, device=device)
    return mask.tril_(diagonal=num_above)


AttentionInterface.register(NAME, tree_attention)
