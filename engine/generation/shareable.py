"""Memory that an engine process of this user maps: on this machine's own, or on the GPU that both use.

Neither has a name in any file system. The kernel frees the one, and the driver the other, when the last process that
uses it is gone, however it went: nothing can be left behind. A small ``/dev/shm``, as containers have it, does not
limit it. Linux only.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

import msgspec
import torch
from torch import Tensor


class CudaAddress(msgspec.Struct, frozen=True, kw_only=True):
    """What CUDA and torch need to map a piece of another process' GPU memory; plain values, valid once."""

    handle: bytes
    storage_bytes: int
    storage_offset: int
    counter_handle: bytes
    counter_offset: int
    event_handle: bytes
    is_event_awaited: bool


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """Where the memory is; one of the two."""

    path: str | None = None
    cuda: CudaAddress | None = None


class Memory(Protocol):
    """Bytes that are taken when they are first asked for."""

    bytes_per_element: int
    """To ask for: as wide as an element may be, where what is not written costs nothing."""

    def take(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8; the same memory at every call, whatever ``num_bytes`` then is."""
        ...

    def settle(self) -> None:
        """Return when what was written to it is there for other processes, and what was read of others may change."""
        ...

    def address(self) -> Address:
        """For one mapping; valid until the memory is closed."""
        ...

    def close(self) -> None:
        """Give it back as soon as nobody else maps it. Idempotent."""
        ...


class HostMemory:
    """Pages are taken as they are written."""

    bytes_per_element = 8

    def __init__(self) -> None:
        self._file: int | None = None
        self._memory: Tensor | None = None

    def take(self, num_bytes: int) -> Tensor:
        if self._memory is None:
            self._file = os.memfd_create("weights", os.MFD_CLOEXEC)
            os.ftruncate(self._file, num_bytes)
            self._memory = torch.from_file(self._path, shared=True, size=num_bytes, dtype=torch.uint8)
        return self._memory

    def settle(self) -> None:
        """Nothing is pending: a copy from a GPU into pageable memory is over when it returns."""

    def address(self) -> Address:
        return Address(path=self._path)

    def close(self) -> None:
        self._memory = None
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @property
    def _path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._file}"


class CudaMemory:
    """On ``device``, which the engine computes on, too: a version is copied within the GPU, and never leaves it."""

    bytes_per_element = 4

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: Tensor | None = None

    def take(self, num_bytes: int) -> Tensor:
        if self._memory is None:
            self._memory = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        return self._memory

    def settle(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()

    def address(self) -> Address:
        assert self._memory is not None, "nothing was taken"
        # What torch.multiprocessing would pickle; as plain values, since nothing that we read is ever unpickled.
        share: Any = self._memory.untyped_storage()._share_cuda_
        _, handle, size, offset, counter, counter_offset, event, is_awaited = share()
        return Address(
            cuda=CudaAddress(
                handle=handle,
                storage_bytes=size,
                storage_offset=offset,
                counter_handle=counter,
                counter_offset=counter_offset,
                event_handle=event,
                is_event_awaited=is_awaited,
            )
        )

    def close(self) -> None:
        self._memory = None


def map_address(address: Address, *, num_bytes: int, device: torch.device) -> Tensor:
    """[num_bytes] uint8: the other process' memory. ``device``: under which this process knows the GPU."""
    if address.cuda is None:
        assert address.path is not None
        # Mapped anew each time: the pages are in memory already, and a mapping that is kept would keep the memory of a
        # version that the other side has given up.
        return torch.from_file(address.path, shared=True, size=num_bytes, dtype=torch.uint8)
    cuda = address.cuda
    storage = torch.UntypedStorage._new_shared_cuda(
        device.index or 0,
        cuda.handle,
        cuda.storage_bytes,
        cuda.storage_offset,
        cuda.counter_handle,
        cuda.counter_offset,
        cuda.event_handle,
        cuda.is_event_awaited,
    )
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)[:num_bytes]
