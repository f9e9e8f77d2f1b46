"""Tensors from one CUDA stream to another inside a process: who waits for whom, and when memory may be used again.

    producer's stream   ... kernels that write x ... | record event
    consumer's stream                                  wait for event | kernels that read x ...

The host waits for nothing: the order is kept on the device. On CPU there are no streams, and every call here passes its
tensors on as they are. Knows nothing of what the tensors mean; imports torch and numpy alone.

To lend a buffer and get it back, hand over twice: the producer publishes, the consumer consumes and reads, then
publishes the same tensors on its own stream, and the producer consumes that ticket before it writes again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

ALIGNMENT = 256
"""Bytes between the starts of two arrays in a staging buffer: what the caching allocator itself aligns to."""


HostArray = npt.NDArray[np.generic] | torch.Tensor


class Event(Protocol):
    """The part of ``torch.cuda.Event`` that guards a staging buffer."""

    def synchronize(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """Tensors on their way from one stream to another. Read them through ``consume`` only."""

    tensors: tuple[torch.Tensor, ...]
    device: torch.device
    event: torch.cuda.Event | None
    """Reached when the tensors are written; None on CPU, where they are."""


def use_own_stream(device: torch.device) -> None:
    """From here on the calling thread launches its work on ``device`` on a stream of its own, beside the others'.

    Without it all threads share one stream, and the device does their work in turns. What the thread has launched so
    far comes before. On CPU nothing changes.
    """
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        torch.cuda.set_stream(stream)


def record(device: torch.device, stream: torch.cuda.Stream | None = None) -> torch.cuda.Event | None:
    """The moment at which what ``stream`` was asked to do until now is done. None on CPU, where it is done.

    For tensors that are handed over later, by another thread, than they were written: ``publish`` would record where
    that thread stands. Goes into a ``Ticket`` with them.

    Args:
        stream: of ``device``; the current stream of the calling thread unless told otherwise.
    """
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream or torch.cuda.current_stream(device))
    return event


def publish(tensors: Sequence[torch.Tensor], stream: torch.cuda.Stream | None = None) -> Ticket:
    """Hand tensors over: what ``stream`` was asked to do until now happens before anything that a consumer does.

    Keep no other reference that writes to them. On CPU the ticket holds the same tensors, which share their memory.

    Args:
        tensors: all on one device; at least one.
        stream: where they are written; the current stream of the calling thread unless told otherwise.

    Raises:
        ValueError: no tensor, or tensors on more than one device.
    """
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1:
        names = ", ".join(sorted(map(str, devices))) or "none"
        raise ValueError(f"a handoff takes tensors of one device, got {names}; publish one ticket for each device")
    [device] = devices
    return Ticket(tensors=tuple(tensors), device=device, event=record(device, stream))


def consume(ticket: Ticket, stream: torch.cuda.Stream | None = None) -> tuple[torch.Tensor, ...]:
    """Take tensors over: everything asked of ``stream`` from now on happens after they are written.

    Also tells the caching allocator that ``stream`` uses them, so that their memory is not given to someone else while
    kernels that read them are still queued, even if the last reference goes before. May be called more than once, for
    several consumers. On CPU returns the same tensors, without copying.

    Args:
        stream: where they are read; the current stream of the calling thread unless told otherwise. Kernels that read
            them must be launched on it, or after it.
    """
    if ticket.event is None:
        return ticket.tensors
    stream = stream or torch.cuda.current_stream(ticket.device)
    stream.wait_event(ticket.event)
    for tensor in ticket.tensors:
        tensor.record_stream(stream)
    return ticket.tensors


class Uploader:
    """Copies arrays to a device from pinned memory, on a copy stream of its own, beside the kernels that run meanwhile.

    One caller at a time. There are ``num_buffers`` staging buffers, used in turns, so that one can be filled while
    another is read by the device; they grow to the largest upload and are kept.
    """

    def __init__(self, device: torch.device | str, *, num_buffers: int = 2) -> None:
        self.device: Final = torch.device(device)
        self._stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._staging = StagingRing[torch.cuda.Event](num_buffers, allocate=_allocate_pinned)

    def upload(self, arrays: Sequence[HostArray]) -> Ticket:
        """Copy arrays to the device, in the order given, with their shapes and dtypes.

        The arrays may be changed as soon as this returns. The host waits only when the staging buffer whose turn it is
        is still being read, by the upload ``num_buffers`` before this one. On CPU nothing is copied: the tensors share
        the memory of writable arrays, and CPU tensors are passed on as they are. Read-only arrays are copied all the
        same, for torch has no tensor that cannot be written, and so are those whose byte order or strides torch does
        not have.

        Raises:
            ValueError: no array, or a tensor that is not on CPU.
            TypeError: a dtype that torch does not have.
        """
        for array in arrays:
            if isinstance(array, torch.Tensor) and array.device.type != "cpu":
                raise ValueError(
                    f"an upload takes arrays in host memory, got a tensor on {array.device}; publish it instead"
                )
        if not arrays:
            raise ValueError("an upload needs at least one array, got none")
        if self._stream is None:
            return publish([_as_tensor(array) for array in arrays])
        layout = lay_out(arrays)
        staging, slot = self._staging.take(layout.num_bytes)
        pack(arrays, layout, staging)
        with torch.cuda.stream(self._stream):
            # One copy for all: a launch costs as much as moving tens of kilobytes.
            landed = staging[: layout.num_bytes].to(self.device, non_blocking=True)
        ticket = publish(unpack(landed, layout), self._stream)
        assert ticket.event is not None
        self._staging.give_back(slot, ticket.event)
        return ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one array lies in a staging buffer, and what it is."""

    start: int
    """Bytes from the beginning of the buffer."""
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    places: tuple[Place, ...]
    num_bytes: int


def lay_out(arrays: Sequence[HostArray]) -> Layout:
    """Place arrays one after the other, each start a multiple of ``ALIGNMENT``.

    Raises:
        TypeError: a dtype that torch does not have.
    """
    places: list[Place] = []
    end = 0
    for array in arrays:
        place = Place(start=end, num_bytes=array.nbytes, dtype=_torch_dtype(array), shape=tuple(array.shape))
        places.append(place)
        end += -(-place.num_bytes // ALIGNMENT) * ALIGNMENT
    return Layout(places=tuple(places), num_bytes=end)


def pack(arrays: Sequence[HostArray], layout: Layout, buffer: torch.Tensor) -> None:
    """Copy arrays of any strides and byte order into ``buffer`` ([>= layout.num_bytes] uint8, in host memory)."""
    for array, target in zip(arrays, unpack(buffer, layout), strict=True):
        if isinstance(array, torch.Tensor):
            target.copy_(array)
        else:
            target.numpy()[...] = array


def unpack(buffer: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    """The arrays of ``layout`` as views of ``buffer``."""
    return [
        buffer[place.start : place.start + place.num_bytes].view(place.dtype).view(place.shape)
        for place in layout.places
    ]


def _torch_dtype(array: HostArray) -> torch.dtype:
    if isinstance(array, torch.Tensor):
        return array.dtype
    return torch.from_numpy(np.empty(0, array.dtype.newbyteorder("="))).dtype


def _as_tensor(array: HostArray) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        return array
    native = array.dtype.newbyteorder("=")
    can_share = array.flags.writeable and array.dtype == native and all(stride >= 0 for stride in array.strides)
    return torch.from_numpy(array if can_share else np.array(array, dtype=native, order="C"))


EventT = TypeVar("EventT", bound=Event)


class StagingRing(Generic[EventT]):
    """Staging buffers used in turns, each guarded by the event after which nobody reads it any more."""

    def __init__(self, num_buffers: int, *, allocate: Callable[[int], torch.Tensor]) -> None:
        if num_buffers < 1:
            raise ValueError(f"num_buffers must be >= 1, got {num_buffers}")
        self._allocate = allocate
        self._buffers: list[torch.Tensor | None] = [None] * num_buffers
        self._guards: list[EventT | None] = [None] * num_buffers
        self._turn = 0

    def take(self, num_bytes: int) -> tuple[torch.Tensor, int]:
        """The next buffer, [>= num_bytes] uint8 and read by nobody, and its slot. Blocks until its guard is reached."""
        slot = self._turn
        self._turn = (slot + 1) % len(self._buffers)
        guard = self._guards[slot]
        if guard is not None:
            guard.synchronize()
            self._guards[slot] = None
        buffer = self._buffers[slot]
        if buffer is None or buffer.numel() < num_bytes:
            # At least doubled, because allocating pinned memory takes milliseconds and stalls the device.
            buffer = self._allocate(max(num_bytes, 0 if buffer is None else 2 * buffer.numel()))
            self._buffers[slot] = buffer
        return buffer, slot

    def give_back(self, slot: int, guard: EventT) -> None:
        """The buffer is read until ``guard`` is reached."""
        self._guards[slot] = guard


def _allocate_pinned(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
