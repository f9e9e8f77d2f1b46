"""How a version gets from this process' memory into a vLLM engine's: four ways behind vLLM's transfer API.

    shm     this machine's memory, mapped by every worker              any device
    ipc     memory of the one GPU that learner and engine compute on   one GPU
    gloo    broadcast, received by workers while answers go on         any device
    nccl    broadcast from GPU to GPU while generation stands still    different GPUs

An adapter, which is small, goes through a folder whatever the way, as vLLM loads adapters from nothing else.

In each of them the version is packed into a segment first (``engine.generation.segment``). What the workers do with it
lies in ``engine.generation.vllm_inside``; when it is done is ``engine.generation.vllm``'s business.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol

import msgspec
import torch
from torch import Tensor

from engine.adapter_files import write_adapter
from engine.errors import RecipeError
from engine.generation.requests import settled
from engine.generation.segment import Packed, Segment
from engine.generation.shareable import CudaMemory, HostMemory
from engine.generation.version import TensorGroup
from engine.generation.vllm_engine import VllmEngine
from engine.recipe import LoraConfig, SamplerConfig
from engine.transport.tensor_plane import WeightSender

Way = Literal["shm", "ipc", "gloo", "nccl"]

_HOST = "127.0.0.1"
"""Engines are children of this process."""
_TIMEOUT_S = 60.0
"""How long sender and workers wait for each other; each wait is for one bucket at most."""


def choose(transfer: Literal["auto"] | Way, config: SamplerConfig, weights_device: torch.device) -> Way:
    """The recipe's way, or for "auto" the shortest there is.

    Raises:
        RecipeError: it cannot go between these devices.
    """
    device = torch.device(config.device)
    if transfer == "auto":
        return "ipc" if share_gpu(config, weights_device) else "shm"
    if transfer == "ipc" and not share_gpu(config, weights_device):
        raise RecipeError(
            f"weights.transfer='ipc' needs one engine on the one GPU that the learner uses; sampler.device is "
            f"{config.device!r} with {_num_devices(config)} devices, the weights lie on {str(weights_device)!r}; use "
            "'auto'"
        )
    if transfer == "nccl" and (device.type != "cuda" or weights_device.type != "cuda"):
        raise RecipeError(
            f"weights.transfer='nccl' goes from GPU to GPU; sampler.device is {config.device!r}, the weights lie on "
            f"{str(weights_device)!r}; use 'auto', 'shm' or 'gloo'"
        )
    if transfer == "nccl" and (device.index or 0) == (weights_device.index or 0):
        raise RecipeError(
            f"weights.transfer='nccl' goes between different GPUs, and learner and sampler both use {config.device!r}; "
            "use 'auto' or 'ipc'"
        )
    return transfer


def make_segments(way: Way, weights_device: torch.device, *, number: int | None = None) -> list[Segment]:
    """The memory that versions are packed into. In this machine's there are two: one is loaded, or waits for running
    answers to end, while the next version is packed into the other. On a GPU, where memory is dear and packing takes
    milliseconds, there is one, unless ``number`` says otherwise."""
    if way in ("ipc", "nccl"):
        return [Segment(CudaMemory(weights_device)) for _ in range(number or 1)]
    return [Segment(HostMemory()) for _ in range(number or 2)]


def make_transfer(
    way: Way,
    weights_device: torch.device,
    *,
    bucket_bytes: int,
    lora: LoraConfig | None = None,
    groups: Sequence[TensorGroup] = (),
) -> Transfer:
    """
    Args:
        lora: versions are adapters of this kind, and consist of ``groups``.
    """
    if lora is not None:
        return _Adapter(lora, groups)
    if way == "shm" or way == "ipc":
        return _Mapped()
    return _Broadcast(way, weights_device, bucket_bytes=bucket_bytes)


class Transfer(Protocol):
    """Between one segment and one engine. What fails in it fails for good: the engine's weights are not known then."""

    backend: str
    """Its name among vLLM's."""

    async def connect(self, engine: VllmEngine) -> None:
        """Once, before the first version."""
        ...

    async def bring(self, engine: VllmEngine, segment: Segment, packed: Packed) -> None:
        """As much as can be done while answers go on."""
        ...

    async def load(self, engine: VllmEngine, segment: Segment, packed: Packed, *, version: int) -> None:
        """The rest, while the engine stands still: it becomes ``version``."""
        ...

    def close(self) -> None: ...


class _Mapped:
    """Workers read the segment's own memory."""

    backend = "shm"

    async def connect(self, engine: VllmEngine) -> None:
        await engine.init_transfer({})

    async def bring(self, engine: VllmEngine, segment: Segment, packed: Packed) -> None:
        pass

    async def load(self, engine: VllmEngine, segment: Segment, packed: Packed, *, version: int) -> None:
        # The handles of GPU memory are bytes, which vLLM's messages carry as they are.
        await engine.load(msgspec.to_builtins(packed, builtin_types=(bytes,)), version=version)

    def close(self) -> None:
        pass


class _Adapter:
    """Versions are low-rank adapters: written while answers go on, loaded in place while the engine stands still."""

    backend = "shm"

    def __init__(self, lora: LoraConfig, groups: Sequence[TensorGroup]) -> None:
        self._lora = lora
        self._groups = groups
        self._scratch = tempfile.TemporaryDirectory(prefix="slipstream-adapter-")
        self._folder = Path(self._scratch.name) / "policy"

    async def connect(self, engine: VllmEngine) -> None:
        """With an adapter that changes nothing, so that answers under way take over the first one that does."""
        nothing = [(group.names[0], torch.zeros(group.shape)) for group in self._groups]
        await asyncio.to_thread(self._write, nothing)
        await engine.load_adapter(self._folder)

    async def bring(self, engine: VllmEngine, segment: Segment, packed: Packed) -> None:
        (bucket,) = segment.buckets(packed, bucket_bytes=packed.num_bytes)
        await asyncio.to_thread(self._write, zip(bucket.names, bucket.tensors, strict=True))

    async def load(self, engine: VllmEngine, segment: Segment, packed: Packed, *, version: int) -> None:
        await engine.load_adapter(self._folder)
        await engine.set_version(version)

    def close(self) -> None:
        self._scratch.cleanup()

    def _write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        write_adapter(self._folder, tensors, self._lora)


class _Broadcast:
    """One sender, the engine's workers, and a group of their own, so that an engine that is gone takes nobody along."""

    backend = "plane"

    def __init__(self, way: Literal["gloo", "nccl"], weights_device: torch.device, *, bucket_bytes: int) -> None:
        self._way = way
        self._device = torch.device("cpu") if way == "gloo" else weights_device
        self._bucket_bytes = bucket_bytes
        self._sender: WeightSender | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="send weights")

    async def connect(self, engine: VllmEngine) -> None:
        self._sender = sender = WeightSender(
            host=_HOST, num_receivers=engine.num_workers, device=self._device, backend=self._way, timeout_s=_TIMEOUT_S
        )
        joining = asyncio.get_running_loop().run_in_executor(self._thread, sender.join)
        await self._both(joining, engine.init_transfer({"meeting": msgspec.to_builtins(sender.meeting)}))

    async def bring(self, engine: VllmEngine, segment: Segment, packed: Packed) -> None:
        if self._way == "gloo":
            await engine.call_workers("fetch_weights")
            await self._send(engine, segment, packed)

    async def load(self, engine: VllmEngine, segment: Segment, packed: Packed, *, version: int) -> None:
        if self._way == "gloo":
            await engine.load({"is_fetched": True}, version=version)
        else:
            await self._both(self._send(engine, segment, packed), engine.load({"is_fetched": False}, version=version))

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()
        self._thread.shutdown(wait=False)

    async def _send(self, engine: VllmEngine, segment: Segment, packed: Packed) -> None:
        """A sender whose workers are gone may wait for them until its time is over; nobody waits for it then."""
        assert self._sender is not None, "connect comes first"
        sender, buckets = self._sender, segment.buckets(packed, bucket_bytes=self._bucket_bytes)
        sending = asyncio.get_running_loop().run_in_executor(self._thread, sender.send, buckets)
        dying = asyncio.ensure_future(engine.watch())
        try:
            await asyncio.wait([sending, dying], return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                self.close()
                sending.add_done_callback(lambda late: late.exception())
                await dying
            await sending
        finally:
            dying.cancel()
            await settled(dying)

    async def _both(self, sending: Awaitable[None], receiving: Awaitable[None]) -> None:
        """When one fails the other is not waited for: it would wait for the first."""
        try:
            await asyncio.gather(sending, receiving)
        except BaseException:
            self.close()
            raise


def share_gpu(config: SamplerConfig, weights_device: torch.device) -> bool:
    """Whether the engine computes on one GPU and the weights that it is sent lie there."""
    device = torch.device(config.device)
    is_same = (device.type, device.index or 0) == (weights_device.type, weights_device.index or 0)
    return device.type == "cuda" and _num_devices(config) == 1 and is_same


def _num_devices(config: SamplerConfig) -> int:
    return config.vllm.num_engines * config.vllm.tensor_parallel * config.vllm.data_parallel
