"""Where keys and values lie: one preallocated row per slot, the occupied rows dense at the front. Knows no tokens.

    L positions that a pass looks at      n occupied rows      H heads of keys and values      D their width

A transformers model sees an ordinary ``Cache``. What a forward pass does with it was said just before by
``begin_prefill`` or ``begin_decode``: a prefill stores and attends only to what it computes itself; a decode step
stores one position per row and attends to the first L of every row, behind the mask that the caller gives the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

_GRAIN = 64
"""Capacity grows in multiples of this; also keeps every row's address aligned alike, which keeps the bits alike."""


class SlotCache(Cache):
    """[num_slots, H, capacity, D] keys and values per layer.

    Rows hold finite numbers at all times, also where nothing was stored: a masked position weighs exactly 0, and
    0 · finite is 0, so what an earlier sequence left behind never reaches a result.
    """

    def __init__(self, *, num_slots: int) -> None:
        super().__init__(layers=[])
        self._num_slots = num_slots
        self._capacity = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._num_rows = 0
        self._length = 0
        self._is_prefill = False
        self._rows: Tensor | None = None
        self._others: Tensor | None = None
        """Prefill: the batch row that each of ``_rows`` is filled from. Decode: the position that each row stores."""
        self._places: dict[int, Tensor] = {}
        """Decode, by number of heads: [n · H] where each row and head stores, counted in vectors of a layer."""

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def length(self) -> int:
        """Positions of every row that the pass that was begun looks at."""
        return self._length

    def reserve(self, length: int) -> None:
        """Make room for ``length`` positions in every row; contents stay. Grows by at least half, never shrinks."""
        if length <= self._capacity:
            return
        wanted = max(length, self._capacity + self._capacity // 2)
        self._capacity = -(-wanted // _GRAIN) * _GRAIN
        for tensors in (self._keys, self._values):
            for layer, old in enumerate(tensors):
                # One layer at a time: the old and the new of the whole cache never exist together.
                tensors[layer] = self._allocate(old)
                tensors[layer][:, :, : old.shape[2]] = old

    def begin_prefill(self, *, rows: Tensor, sources: Tensor, length: int) -> None:
        """The next forward pass has ``length`` positions; row ``rows[i]`` takes batch row ``sources[i]`` of it."""
        self.reserve(length)
        self._is_prefill, self._rows, self._others, self._length = True, rows, sources, length

    def begin_decode(self, *, rows: Tensor, positions: Tensor, length: int) -> None:
        """The next forward pass has one position for each of the first rows.

        Args:
            rows: 0, 1, …
            positions: where each row stores it, below ``length``.
            length: positions of every row that are attended to.
        """
        self.reserve(length)
        self._is_prefill, self._rows, self._others, self._length = False, rows, positions, length
        self._num_rows = len(rows)
        self._places = {}

    def copy_row(self, *, source: int, target: int, length: int) -> None:
        """Row ``target`` becomes ``source`` in its first ``length`` positions."""
        for tensors in (self._keys, self._values):
            for tensor in tensors:
                tensor[target, :, :length] = tensor[source, :, :length]

    # What a model's forward pass calls.

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store, and return what to attend to; ``key_states`` and ``value_states`` are [batch, H, positions, D]."""
        while len(self._keys) <= layer_idx:
            self._keys.append(self._allocate(key_states))
            self._values.append(self._allocate(value_states))
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        rows, others = self._rows, self._others
        assert rows is not None, "no pass was begun"
        assert others is not None, "no pass was begun"
        if self._is_prefill:
            keys[rows, :, : self._length] = key_states[others]
            values[rows, :, : self._length] = value_states[others]
            return key_states, value_states
        self._store(keys, key_states)
        self._store(values, value_states)
        return keys[: self._num_rows, :, : self._length], values[: self._num_rows, :, : self._length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self._is_prefill else self._length - 1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return (query_length if self._is_prefill else self._length), 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def _store(self, layer: Tensor, states: Tensor) -> None:
        """One vector per row and head. By one flat index: indexing by row and position at once took 95 µs, this 10."""
        heads, width = layer.shape[1], layer.shape[3]
        if heads not in self._places:
            rows, positions = self._rows, self._others
            assert rows is not None, "no pass was begun"
            assert positions is not None, "no pass was begun"
            first_nH = rows[:, None] * heads + torch.arange(heads, device=layer.device)
            self._places[heads] = (first_nH * self._capacity + positions[:, None]).flatten()
        layer.view(-1, width).index_copy_(0, self._places[heads], states.reshape(-1, width))

    def _allocate(self, like: Tensor) -> Tensor:
        _, heads, _, width = like.shape
        return torch.zeros((self._num_slots, heads, self._capacity, width), dtype=like.dtype, device=like.device)
