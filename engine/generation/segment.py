"""Memory that another process of this user can map, and a policy version laid out in it.

The memory has no name in any file system: the kernel frees it when the last process that uses it is gone, however it
went, so nothing can be left behind; and a small ``/dev/shm``, as containers have it, does not limit it. Linux only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

import msgspec
import torch
from torch import Tensor

from engine.generation.checkpoint_names import CheckpointPart, checkpoint_parts
from engine.generation.protocol import Bucket
from engine.generation.staging import written
from engine.generation.version import Arrival, TensorGroup

_ALIGN = 64
"""Bytes: a cache line, and enough for every vector load."""


class Packed(msgspec.Struct, frozen=True, kw_only=True):
    """Where the tensors of a version lie; lists of equal length, names as in a checkpoint."""

    path: str
    """Of the memory, for a process of this user on this machine; valid until the segment is packed again or closed."""
    num_bytes: int
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    offsets: list[int]


class Segment:
    """One version at a time, in memory that is taken as it is filled."""

    def __init__(self) -> None:
        self._file: int | None = None
        self._memory: Tensor | None = None

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
                wider than 8 bytes.
            WeightsMismatch: what came has another digest.
        """
        memory = self._open(groups)
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
        arrival.complete()
        return Packed(
            path=self._path,
            num_bytes=end,
            names=[part.name for part, _, _ in parts],
            dtypes=[str(dtype).removeprefix("torch.") for _, dtype, _ in parts],
            shapes=[list(part.shape) for part, _, _ in parts],
            offsets=[offset for _, _, offset in parts],
        )

    def close(self) -> None:
        """Give the memory back as soon as nobody else maps it. Idempotent."""
        self._memory = None
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self, groups: Sequence[TensorGroup]) -> Tensor:
        if self._memory is None:
            # Room for any dtype: pages that are not written take no memory.
            size = sum(group.shape.numel() * 8 + _ALIGN for group in groups)
            self._file = os.memfd_create("weights", os.MFD_CLOEXEC)
            os.ftruncate(self._file, size)
            self._memory = torch.from_file(self._path, shared=True, size=size, dtype=torch.uint8)
        return self._memory

    @property
    def _path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._file}"
