"""A policy version laid out in memory that an engine process maps, with all that is needed to find its tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec
import torch
from torch import Tensor

from engine.generation.checkpoint_names import CheckpointPart, checkpoint_parts
from engine.generation.protocol import Bucket
from engine.generation.shareable import Address, Memory
from engine.generation.staging import written
from engine.generation.version import Arrival, TensorGroup
from engine.transport.flat import cut

_ALIGN = 64
"""Bytes: a cache line, and enough for every vector load."""


class Packed(msgspec.Struct, frozen=True, kw_only=True):
    """Where the tensors of a version lie; lists of equal length, names as in a checkpoint."""

    address: Address
    """For one mapping; valid until the segment is packed again or closed."""
    num_bytes: int
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    offsets: list[int]


class Segment:
    """One version at a time."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def pack(
        self,
        buckets: Iterable[Bucket],
        groups: Sequence[TensorGroup],
        *,
        digest: str | None,
        is_wanted: Callable[[], bool],
    ) -> Packed | None:
        """Copy a version in, in the order in which it comes. Blocks; called in a worker thread.

        Args:
            groups: what the model has.
            digest: what all tensors must amount to; None: not compared.
            is_wanted: asked before each bucket; False ends the copying early.

        Returns:
            None when it was not wanted any more.

        Raises:
            ValueError: a name or shape that the model does not have, parameters that are missing, or elements that are
                wider than the memory has room for.
            WeightsMismatch: what came has another digest.
        """
        num_bytes_each = self._memory.bytes_per_element
        memory = self._memory.take(sum(group.shape.numel() * num_bytes_each + _ALIGN for group in groups))
        arrival = Arrival(groups, digest=digest)
        parts: list[tuple[CheckpointPart, torch.dtype, int]] = []
        end = 0
        for bucket in buckets:
            if not is_wanted():
                return None
            for name, tensor in zip(bucket.names, written(bucket), strict=True):
                arrival.expect(name, tensor)
                num_bytes = tensor.numel() * tensor.element_size()
                if end + num_bytes > len(memory):
                    raise ValueError(f"weights: {name!r} does not fit; was a name sent twice, or as {tensor.dtype}?")
                memory[end : end + num_bytes].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
                arrival.add(name, tensor)
                for part in checkpoint_parts(name, tuple(tensor.shape)):
                    parts.append((part, tensor.dtype, end + part.first_element * tensor.element_size()))
                end += -(-num_bytes // _ALIGN) * _ALIGN
            # The sender may overwrite the bucket as soon as it is asked for the next one.
            self._memory.settle()
        arrival.complete()
        return Packed(
            address=self._memory.address(),
            num_bytes=end,
            names=[part.name for part, _, _ in parts],
            dtypes=[str(dtype).removeprefix("torch.") for _, dtype, _ in parts],
            shapes=[list(part.shape) for part, _, _ in parts],
            offsets=[offset for _, _, offset in parts],
        )

    def buckets(self, packed: Packed, *, bucket_bytes: int) -> Iterator[Bucket]:
        """What was packed, under its names in a checkpoint, in the memory itself."""
        memory = self._memory.take(packed.num_bytes)
        tensors = [
            view_of(memory, dtype=dtype, shape=shape, offset=offset)
            for dtype, shape, offset in zip(packed.dtypes, packed.shapes, packed.offsets, strict=True)
        ]
        for part in cut([tensor.nbytes for tensor in tensors], limit=bucket_bytes):
            yield Bucket(names=tuple(packed.names[i] for i in part), tensors=tuple(tensors[i] for i in part))

    def close(self) -> None:
        """Give the memory back as soon as nobody else maps it. Idempotent."""
        self._memory.close()


def view_of(memory: Tensor, *, dtype: str, shape: Sequence[int], offset: int) -> Tensor:
    """A tensor that begins ``offset`` bytes into ``memory`` ([N] uint8), which it shares."""
    kind: torch.dtype = getattr(torch, dtype)
    return memory[offset : offset + math.prod(shape) * kind.itemsize].view(kind).view(tuple(shape))
