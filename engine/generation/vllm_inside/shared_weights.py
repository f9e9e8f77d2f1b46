"""vLLM's side of a weight update through memory that both processes map: back end ``shm`` of its transfer API.

The learner's process has written a whole version into a segment (``engine.generation.segment``) before generation was
paused; here it is loaded, layer by layer, straight from there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from engine.generation.shareable import Address, map_address


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


class SharedWeightsEngine(WeightTransferEngine):  # type: ignore[misc]
    """``update_weights`` loads everything; a tensor of the model that no part of the version went into is an error."""

    init_info_cls = SharedInit
    update_info_cls = SharedUpdate

    def init_transfer_engine(self, init_info: SharedInit) -> None:
        """Nothing to agree upon."""

    def start_weight_update(self) -> None:
        # What the reload takes apart (tied tensors) is there before, what was derived from others (latent attention) is
        # not there after it: both are expected from nobody.
        before = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)
        self._expected = before & {name for name, _ in self.model.named_parameters()}

    def receive_weights(self, update_info: SharedUpdate) -> None:
        address = msgspec.convert(update_info.address, Address)
        memory = map_address(address, num_bytes=update_info.num_bytes, device=self.device)
        loaded = self.model.load_weights(_tensors(memory, update_info))
        if loaded is not None and (missing := sorted(self._expected - loaded)):
            raise RuntimeError(
                f"vLLM put nothing of the new version into {len(missing)} of its parameters, among them "
                f"{missing[0]!r}: it knows this architecture's tensors by other names than were sent"
            )

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """The base class synchronises the accelerator, which a CPU has not."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()  # the sender packs the next version into the same memory

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing is held between two updates."""


def _tensors(memory: Tensor, update: SharedUpdate) -> Iterator[tuple[str, Tensor]]:
    for name, dtype_name, shape, offset in zip(update.names, update.dtypes, update.shapes, update.offsets, strict=True):
        dtype = getattr(torch, dtype_name)
        num_bytes = math.prod(shape) * dtype.itemsize
        yield name, memory[offset : offset + num_bytes].view(dtype).view(shape)
