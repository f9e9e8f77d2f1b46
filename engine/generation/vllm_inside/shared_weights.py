"""vLLM's side of a weight update through memory that both processes map: back end ``shm`` of its transfer API.

The learner's process has written a whole version into a segment (``engine.generation.segment``) before generation was
paused; here it is loaded, layer by layer, straight from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo

from engine.generation.segment import view_of
from engine.generation.shareable import Address, map_address
from engine.generation.vllm_inside.whole_version import WholeVersionEngine


@dataclass
class SharedInit(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing: every update says where it lies."""


@dataclass
class SharedUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """One version, as ``engine.generation.segment.Packed`` describes it; lists of equal length."""

    address: dict[str, Any]
    num_bytes: int
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    offsets: list[int]
    """Of the first byte of each tensor in the segment."""


class SharedWeightsEngine(WholeVersionEngine):
    init_info_cls = SharedInit
    update_info_cls = SharedUpdate

    def init_transfer_engine(self, init_info: SharedInit) -> None:
        """Nothing to agree upon."""

    def receive_weights(self, update_info: SharedUpdate) -> None:
        address = msgspec.convert(update_info.address, Address)
        memory = map_address(address, num_bytes=update_info.num_bytes, device=self.device)
        self.load([_tensors(memory, update_info)])

    def shutdown(self) -> None:
        """Nothing is held between two updates."""


def _tensors(memory: Tensor, update: SharedUpdate) -> Iterator[tuple[str, Tensor]]:
    for name, dtype, shape, offset in zip(update.names, update.dtypes, update.shapes, update.offsets, strict=True):
        yield name, view_of(memory, dtype=dtype, shape=shape, offset=offset)
