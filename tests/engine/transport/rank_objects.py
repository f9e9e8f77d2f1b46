"""What ``test_rank_group`` has its ranks do: tiny objects that meet in real collectives, and go wrong in real ways."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from engine.errors import NonFiniteError
from engine.generation.protocol import Bucket
from engine.transport.shared_arrays import SharedBuffers


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    factor: int = 1


class Batch(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    values: npt.NDArray[np.float32]
    ids: npt.NDArray[np.int32] | None = None


class Counter(Protocol):
    """What the tests call."""

    def total(self, batch: Batch) -> float: ...

    def shapes(self, batch: Batch) -> list[list[int]]: ...

    def where(self) -> list[int]:
        """[rank, pid, open files, bytes of memory]"""
        ...

    def refuse(self, ranks: list[int], kind: str, meet: bool) -> None: ...

    def kill(self, rank: int, signal_number: int) -> None: ...

    def hang(self, rank: int, in_c: bool) -> None: ...

    def pieces(self, num: int, size: int, in_place: bool, fail_at: int = -1) -> Iterator[Bucket]: ...


class RealCounter:
    def __init__(self, settings: Settings, buffers: SharedBuffers) -> None:
        self._factor = settings.factor
        self._buffers = buffers
        self._rank = dist.get_rank()
        # What runs beside the calls meets in a group of its own.
        self._beside = dist.new_group(backend="gloo")

    def total(self, batch: Batch) -> float:
        tensor = torch.from_numpy(batch.values).sum() * self._factor
        dist.all_reduce(tensor)
        return float(tensor)

    def shapes(self, batch: Batch) -> list[list[int]]:
        return [list(batch.values.shape), [] if batch.ids is None else list(batch.ids.shape)]

    def where(self) -> list[int]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return [self._rank, os.getpid(), len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGESIZE")]

    def refuse(self, ranks: list[int], kind: str, meet: bool) -> None:
        if self._rank in ranks:
            raise {"NonFiniteError": NonFiniteError, "KeyError": KeyError}[kind](f"as told, in rank {self._rank}")
        if meet:
            dist.barrier()

    def kill(self, rank: int, signal_number: int) -> None:
        if self._rank == rank:
            os.kill(os.getpid(), signal_number)
        dist.barrier()

    def hang(self, rank: int, in_c: bool) -> None:
        if self._rank == rank:
            if in_c:
                ctypes.PyDLL(None).sleep(1000)  # holds the interpreter's lock
            signal.pause()
        dist.barrier()

    def pieces(self, num: int, size: int, in_place: bool, fail_at: int = -1) -> Iterator[Bucket]:
        assert not torch.is_grad_enabled()
        for i in range(num):
            if i == fail_at:
                raise NonFiniteError(f"item {i}")
            ones = torch.ones(1)
            dist.all_reduce(ones, group=self._beside)
            if in_place:
                memory = self._buffers.take(8 * size, torch.device("cpu"))
                first = memory[: 4 * size].view(torch.float32).fill_(i * float(ones))
                second = memory[4 * size : 6 * size].view(torch.bfloat16).view(2, -1).fill_(-i)
            else:
                first = torch.full((size,), i * float(ones))
                second = torch.full((2, size // 2), -i, dtype=torch.bfloat16)
            yield Bucket(names=(f"a{i}", f"b{i}"), tensors=(first, second))


def make(settings: Settings, buffers: SharedBuffers) -> RealCounter:
    return RealCounter(settings, buffers)


def make_none(settings: Settings) -> RealCounter:
    if dist.get_rank() == 1:
        raise KeyError("no such thing")
    dist.barrier()
    raise AssertionError("the barrier has no end")
