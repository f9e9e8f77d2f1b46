"""Memory that a node and its ranks both map, so that arrays and tensors cross without a copy on the way.

*Arrays* go from the node to its ranks: written once into one file that all ranks map, however many of them read an
array. *Pieces* come back: named tensors that a rank has written into one of two buffers, in this machine's memory or on
its GPU. None of it has a name in a file system (``engine.generation.shareable``), so nothing can be left behind.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.generation.shareable import Address, CudaMemory, HostMemory, Memory, map_address

_ALIGN = 64
"""Bytes: a cache line, and enough for every vector load."""


class ArrayPlace(msgspec.Struct, frozen=True, array_like=True):
    """Where an array lies."""

    offset: int
    """Bytes."""
    dtype: str
    shape: tuple[int, ...]


class ArrayWriter:
    """The node's side: ``place`` arrays, then ``write`` them all. What was written before is overwritten."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("arrays", os.MFD_CLOEXEC)
        self._memory: mmap.mmap | None = None
        self._places: dict[int, ArrayPlace] = {}
        self._arrays: list[tuple[ArrayPlace, npt.NDArray[Any]]] = []
        self._end = 0

    def fileno(self) -> int:
        """Of the file that ranks map."""
        return self._fd

    def place(self, array: npt.NDArray[Any]) -> ArrayPlace:
        """Where it will lie; the same array again lies in the same place."""
        # The array is kept until it is written, so its id stays its own.
        if (place := self._places.get(id(array))) is not None:
            return place
        place = ArrayPlace(self._end, array.dtype.str, array.shape)
        self._places[id(array)] = place
        self._arrays.append((place, array))
        self._end += -(-array.nbytes // _ALIGN) * _ALIGN
        return place

    def write(self) -> None:
        """Copy what was placed since the last time."""
        if self._end and (self._memory is None or len(self._memory) < self._end):
            # A power of two: a run's largest call is reached in a few steps, and ranks map anew as often.
            size = 1 << max(16, (self._end - 1).bit_length())
            os.ftruncate(self._fd, size)
            self._memory = mmap.mmap(self._fd, size)
        for place, array in self._arrays:
            _view(self._memory, place)[...] = array
        self.forget()

    def forget(self) -> None:
        """Begin anew without writing."""
        self._places.clear()
        self._arrays.clear()
        self._end = 0

    def close(self) -> None:
        self.forget()
        self._memory = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class ArrayReader:
    """A rank's side. What it gives is overwritten by the node's next call."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._memory: mmap.mmap | None = None

    def read(self, place: ArrayPlace) -> npt.NDArray[Any]:
        end = place.offset + math.prod(place.shape) * np.dtype(place.dtype).itemsize
        if self._memory is None or len(self._memory) < end:
            # The old mapping goes with the last array that lies in it. Writable, as torch wants it.
            self._memory = mmap.mmap(self._fd, os.fstat(self._fd).st_size)
        return _view(self._memory, place)


def _view(memory: mmap.mmap | None, place: ArrayPlace) -> npt.NDArray[Any]:
    count = math.prod(place.shape)
    if count == 0:
        return np.empty(place.shape, place.dtype)
    assert memory is not None
    flat = np.frombuffer(memory, dtype=place.dtype, count=count, offset=place.offset)
    return flat.reshape(place.shape)


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """Named tensors in one of a rank's two buffers; lists of equal length."""

    buffer: int
    """0 or 1."""
    serial: int
    """Counts the memories that have been this buffer."""
    address: Address | None
    """For one mapping; None: as told before."""
    device: str
    num_bytes: int
    """Of the buffer."""
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    offsets: list[int]


class NamedTensors(Protocol):
    """What a rank's iterator gives. ``engine.generation.protocol.Bucket`` is one."""

    @property
    def names(self) -> Sequence[str]: ...
    @property
    def tensors(self) -> Sequence[Tensor]:
        """On one device."""
        ...

    @property
    def written(self) -> torch.cuda.Event | None: ...


@dataclass(slots=True)
class _Buffer:
    memory: Memory | None = None
    tensor: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    serial: int = 0
    told: int = 0
    """Serial of the memory whose address the node has."""

    def holds(self, tensor: Tensor) -> bool:
        start = self.tensor.data_ptr()
        end = start + self.tensor.numel()
        return (
            self.memory is not None
            and tensor.device == self.tensor.device
            and tensor.is_contiguous()
            and start <= tensor.data_ptr()
            and tensor.data_ptr() + tensor.numel() * tensor.element_size() <= end
        )


class SharedBuffers:
    """A rank's side: two buffers in turn. The node has given one back when it asks for the piece after the next."""

    def __init__(self) -> None:
        self._buffers = (_Buffer(), _Buffer())
        self._turn = 0

    def take(self, num_bytes: int, device: torch.device) -> Tensor:
        """[num_bytes] uint8 on ``device``: the buffer that was not taken last. Made larger when it has to be."""
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._turn = 1 - self._turn
        buffer = self._buffers[self._turn]
        if len(buffer.tensor) < num_bytes or buffer.tensor.device != device:
            if buffer.memory is not None:
                buffer.memory.close()
            buffer.memory = HostMemory() if device.type == "cpu" else CudaMemory(device)
            buffer.tensor = buffer.memory.take(num_bytes)
            buffer.serial += 1
        return buffer.tensor[:num_bytes]

    @property
    def taken(self) -> tuple[int, int]:
        """The buffer taken last: its number, and of how many memories that it has had this is the latest."""
        return self._turn, self._buffers[self._turn].serial

    def address(self) -> Address:
        """Of the buffer taken last, for one mapping by another rank."""
        memory = self._buffers[self._turn].memory
        assert memory is not None, "nothing was taken"
        return memory.address()

    def piece(self, item: NamedTensors) -> Piece:
        """Where the item lies; it is copied into the next buffer unless it lies in one. Returns when it is written."""
        tensors = [tensor.detach() for tensor in item.tensors]
        if item.written is not None:
            torch.cuda.current_stream(tensors[0].device).wait_event(item.written)
        holder = next((b for b in self._buffers if tensors and all(b.holds(tensor) for tensor in tensors)), None)
        if holder is None:
            holder, tensors = self._copied(tensors)
        assert holder.memory is not None
        holder.memory.settle()
        address = None if holder.told == holder.serial else holder.memory.address()
        holder.told = holder.serial
        return Piece(
            buffer=self._buffers.index(holder),
            serial=holder.serial,
            address=address,
            device=str(holder.tensor.device),
            num_bytes=len(holder.tensor),
            names=list(item.names),
            dtypes=[str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
            shapes=[list(tensor.shape) for tensor in tensors],
            offsets=[tensor.data_ptr() - holder.tensor.data_ptr() for tensor in tensors],
        )

    def _copied(self, tensors: list[Tensor]) -> tuple[_Buffer, list[Tensor]]:
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        device = tensors[0].device if tensors else torch.device("cpu")
        total = sum(-(-size // _ALIGN) * _ALIGN for size in sizes)
        memory = self.take(max(total, _ALIGN), device)
        copies, offset = [], 0
        for tensor, size in zip(tensors, sizes, strict=True):
            copies.append(memory[offset : offset + size].view(tensor.dtype).view(tensor.shape).copy_(tensor))
            offset += -(-size // _ALIGN) * _ALIGN
        return self._buffers[self._turn], copies


class PieceReader:
    """The node's side of one rank's buffers."""

    def __init__(self) -> None:
        self._mapped: dict[int, tuple[int, Tensor]] = {}
        """By buffer: serial and memory."""

    def tensors(self, piece: Piece) -> list[Tensor]:
        """Views of the rank's memory; written again when the piece after the next is asked for."""
        serial, memory = self._mapped.get(piece.buffer, (0, None))
        if memory is None or serial != piece.serial:
            assert piece.address is not None, "a rank tells where a new buffer is"
            memory = map_address(piece.address, num_bytes=piece.num_bytes, device=torch.device(piece.device))
            self._mapped[piece.buffer] = (piece.serial, memory)
        tensors = []
        for name, shape, offset in zip(piece.dtypes, piece.shapes, piece.offsets, strict=True):
            dtype: torch.dtype = getattr(torch, name)
            size = math.prod(shape) * dtype.itemsize
            tensors.append(memory[offset : offset + size].view(dtype).view(shape))
        return tensors

    def forget(self) -> None:
        """Give the mappings up; for the life of new ranks."""
        self._mapped.clear()
