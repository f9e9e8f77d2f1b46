"""Megatron's core attention on torch's ``scaled_dot_product_attention``: where TransformerEngine is not.

Packed rows alone: several sequences behind each other in one row, each attending to itself.

    t tokens of this rank      n heads      g heads of keys and values (n, or fewer)      d, e widths of a head
    C ranks that share a sequence      h = length / 2C

With context parallelism each sequence is cut into 2C pieces of h tokens, and rank r holds piece r and piece 2C − 1 − r,
so that all have equally much to compute. Keys and values are gathered, queries stay where they are.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class PackedAttention(MegatronModule):  # type: ignore[misc]
    """What Megatron puts into a layer's ``core_attention``. Causal, without dropout."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["cp"])
        self._cp_group = groups.cp
        self._scale = 1.0 / math.sqrt(k_channels or config.kv_channels) if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """
        Args:
            query: [t, n, d].
            key: [t, g, d].
            value: [t, g, e].
            packed_seq_params: ``cu_seqlens_q`` over the tokens of all C ranks; each length divides by 2C.

        Returns:
            [t, n · e].

        Raises:
            ValueError: the row is not packed, or a mask is given.
        """
        if packed_seq_params is None or attention_mask is not None:
            raise ValueError("this attention takes packed sequences and no mask; give packed_seq_params instead")
        lengths = [end - start for start, end in pairwise(packed_seq_params.cu_seqlens_q.tolist())]
        num_ranks = self._cp_group.size()
        queries = torch.split(query, [length // num_ranks for length in lengths])
        if num_ranks > 1:
            order = _order(lengths, num_ranks).to(key.device)
            key, value = (gather_from_sequence_parallel_region(t, group=self._cp_group)[order] for t in (key, value))
        keys, values = torch.split(key, lengths), torch.split(value, lengths)
        out = [
            _attend(q, k, v, mask=_mask(len(k), self._cp_group, k.device), scale=self._scale)
            for q, k, v in zip(queries, keys, values, strict=True)
        ]
        return torch.cat(out).flatten(1)


def positions_of_rank(length: int, *, rank: int, num_ranks: int) -> Tensor:
    """[length / C] int64: which positions of a sequence rank ``rank`` holds, in the order in which it holds them."""
    if num_ranks == 1:
        return torch.arange(length)
    pieces = torch.arange(length).view(2 * num_ranks, -1)
    return torch.cat((pieces[rank], pieces[2 * num_ranks - 1 - rank]))


def _order(lengths: list[int], num_ranks: int) -> Tensor:
    """[C · t]: where in what was gathered, rank by rank, each position of each sequence lies."""
    per_rank = sum(lengths) // num_ranks
    order = torch.empty(sum(lengths), dtype=torch.int64)
    for rank in range(num_ranks):
        start_global, start_local = 0, rank * per_rank
        for length in lengths:
            held = positions_of_rank(length, rank=rank, num_ranks=num_ranks)
            order[start_global + held] = torch.arange(start_local, start_local + len(held))
            start_global, start_local = start_global + length, start_local + len(held)
    return order


def _mask(length: int, group: Any, device: torch.device) -> Tensor | None:
    """[length / C, length] bool over this rank's queries and all keys; None: plainly causal."""
    if group.size() == 1:
        return None
    held = positions_of_rank(length, rank=group.rank(), num_ranks=group.size()).to(device)
    return held[:, None] >= torch.arange(length, device=device)


def _attend(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, scale: float) -> Tensor:
    """[tokens, heads, width] each."""
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out[0].transpose(0, 1)
