"""Many tensors in one run of bytes: where each of them lies, and how it is seen there. Who carries the bytes, and where
to, is decided elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec
import torch
from torch import Tensor

ALIGN = 64
"""Bytes between the starts of two tensors are a multiple of this: a cache line, and enough for every vector load."""


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor without its values."""

    name: str
    dtype: str
    """As torch calls it, without the ``torch.``: ``bfloat16``."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * dtype_of(self.dtype).itemsize


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """Of one run of bytes."""

    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    """Of the first byte of each."""
    num_bytes: int


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))


def dtype_of(name: str) -> torch.dtype:
    """Raises ValueError when torch knows no such dtype: the name may come from another machine."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch has no dtype {name!r}; sender and receiver must run with versions that know the same")
    return dtype


def lay_out(specs: Iterable[TensorSpec]) -> Layout:
    """One after the other, in the order given."""
    specs, offsets, end = tuple(specs), [], 0
    for spec in specs:
        offsets.append(end)
        end += -(-spec.num_bytes // ALIGN) * ALIGN
    return Layout(specs=specs, offsets=tuple(offsets), num_bytes=end)


def views(flat: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    """The tensors of ``layout``, which share the memory of ``flat`` ([at least num_bytes] uint8).

    Raises:
        ValueError: ``flat`` is too short, or an unknown dtype.
    """
    if len(flat) < layout.num_bytes:
        raise ValueError(f"the layout takes {layout.num_bytes} bytes, the memory has {len(flat)}")
    return tuple(
        flat[offset : offset + spec.num_bytes].view(dtype_of(spec.dtype)).view(spec.shape)
        for spec, offset in zip(layout.specs, layout.offsets, strict=True)
    )


def cut(sizes: Sequence[int], *, limit: int) -> list[range]:
    """Neighbours together, in their order, at most ``limit`` in a group; a larger one has a group of its own."""
    groups: list[range] = []
    start, total = 0, 0
    for place, size in enumerate(sizes):
        if place > start and total + size > limit:
            groups.append(range(start, place))
            start, total = place, 0
        total += size
    if sizes:
        groups.append(range(start, len(sizes)))
    return groups
