"""From a micro-batch to what a pass of the model takes: sequences behind each other in one packed row.

    s tokens of the row      C context-parallel ranks      R tensor-parallel ranks      T response tokens

The last token of an answer is trained but predicts nothing, so it does not go through the model: the token before each
response token is what predicts it. With C > 1 each sequence is padded to a multiple of 2C, and the row at its end to
what R ranks can share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from engine.training.megatron_inside.attention import positions_of_rank
from engine.training.megatron_inside.layer_spec import uses_transformer_engine

PAD_ID = 0
"""In every vocabulary; nothing but other padding attends to it."""

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Row:
    """One packed row, this context-parallel rank's part of it; tensors on the device."""

    token_ids: Tensor
    """[1, s / C] int64."""
    position_ids: Tensor
    """[1, s / C] int64."""
    packing: PackedSeqParams
    places: tuple[Tensor, ...]
    """Of each sequence: [its length] int64 on the CPU, the column of this rank that holds each of its tokens; −1:
    another rank has it."""
    num_computed: int
    """s, padding included."""
    is_real: Tensor
    """[s / C] bool: not padding."""


def make_row(sequences: Sequence[Ids], *, device: torch.device) -> Row:
    """Lay the sequences out. None at all gives a row of padding, which counts for nothing."""
    num_cp, num_tp = (
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    cp_rank = parallel_state.get_context_parallel_rank()
    multiple = 2 * num_cp if num_cp > 1 else 1
    lengths = [-(-len(ids) // multiple) * multiple for ids in sequences]
    # What is missing to a row that all ranks can share is a sequence of its own, so that nobody attends to it.
    missing = -sum(lengths) % math.lcm(multiple, num_tp * num_cp)
    if missing or not lengths:
        lengths.append(missing or math.lcm(multiple, num_tp * num_cp))
    tokens, positions, is_real, places = [], [], [], []
    start = 0
    for number, length in enumerate(lengths):
        ids = np.asarray(sequences[number], np.int64) if number < len(sequences) else np.empty(0, np.int64)
        held = positions_of_rank(length, rank=cp_rank, num_ranks=num_cp)
        padded = torch.full((length,), PAD_ID, dtype=torch.int64)
        padded[: len(ids)] = torch.from_numpy(ids)
        tokens.append(padded[held])
        positions.append(held)
        is_real.append(held < len(ids))
        if number < len(sequences):
            place = torch.full((length,), -1, dtype=torch.int64)
            place[held] = torch.arange(start, start + len(held))
            places.append(place[: len(ids)])
        start += len(held)
    bounds = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
    if uses_transformer_engine():
        bounds = bounds.to(device)  # elsewhere they are read on the host, and would be waited for in every layer
    return Row(
        token_ids=torch.cat(tokens)[None].to(device),
        position_ids=torch.cat(positions)[None].to(device),
        packing=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            # The true one: given the length of the whole row, Megatron takes positions for running on from sequence to
            # sequence.
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
        ),
        places=tuple(places),
        num_computed=sum(lengths),
        is_real=torch.cat(is_real).to(device),
    )
