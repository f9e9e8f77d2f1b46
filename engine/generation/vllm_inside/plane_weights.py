"""vLLM's side of a weight update that is broadcast to it: back end ``plane`` of its transfer API, over gloo or NCCL.

Over gloo a version is received into this worker's memory while answers go on (``fetch``, in a thread of its own), and
loading it is all that generation stands still for. Over NCCL it goes from GPU to GPU during that time, bucket by
bucket: it is fast there, and a second copy of the model would be dear.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo

from engine.generation.protocol import Bucket
from engine.generation.staging import written
from engine.generation.vllm_inside.whole_version import WholeVersionEngine
from engine.transport.tensor_plane import Meeting, WeightReceiver


@dataclass
class PlaneInit(WeightTransferInitInfo):  # type: ignore[misc]
    meeting: dict[str, Any] = field(default_factory=dict)
    """As ``engine.transport.tensor_plane.Meeting``. Worker n is receiver n + 1."""


@dataclass
class PlaneUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    is_fetched: bool
    """``fetch`` was called for it; else it is received now."""


class PlaneWeightsEngine(WholeVersionEngine):
    init_info_cls = PlaneInit
    update_info_cls = PlaneUpdate

    _receiver: WeightReceiver | None = None
    _fetching: Future[list[tuple[str, Tensor]]] | None = None

    def init_transfer_engine(self, init_info: PlaneInit) -> None:
        meeting = msgspec.convert(init_info.meeting, Meeting)
        parallel = self.parallel_config
        self._receiver = WeightReceiver(
            meeting,
            rank=parallel.data_parallel_index * parallel.world_size + parallel.rank + 1,
            device=torch.device("cpu") if meeting.backend == "gloo" else self.device,
        )
        self._fetcher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fetch weights")

    def fetch(self) -> None:
        """Begin to receive a version; returns at once."""
        self._fetching = self._fetcher.submit(self._fetch)

    def receive_weights(self, update_info: PlaneUpdate) -> None:
        assert self._receiver is not None, "init_transfer_engine comes first"
        if not update_info.is_fetched:
            self.load(map(_copies, self._receiver.receive()))
            return
        assert self._fetching is not None, "fetch comes first"
        fetching, self._fetching = self._fetching, None
        self.load([fetching.result()])

    def shutdown(self) -> None:
        if self._receiver is not None:
            self._receiver.close()
            self._fetcher.shutdown(wait=False)

    def _fetch(self) -> list[tuple[str, Tensor]]:
        assert self._receiver is not None, "init_transfer_engine comes first"
        return [pair for bucket in self._receiver.receive() for pair in _copies(bucket)]


def _copies(bucket: Bucket) -> list[tuple[str, Tensor]]:
    """The bucket's memory is used again while vLLM still waits for the rest of a layer."""
    return [(name, tensor.clone()) for name, tensor in zip(bucket.names, written(bucket), strict=True)]
