"""A version out of the ranks: every tensor whole, under its Hugging Face name, in the memory of rank 0.

Nothing is gathered by a collective. Rank 0 says where the next bucket lies, in memory that all ranks of the machine can
map, and every rank copies its pieces straight to their places:

    rank 0    take a buffer | tell where ──▶| copy own pieces | meet | the bucket is whole
    rank r                    map it        | copy own pieces | meet |

What several ranks hold alike is copied by one of them, in turns over the tensors. So a byte is moved once, no rank ever
holds a tensor that it does not train, and a forward or backward pass that goes on beside it meets nobody in here: what
the ranks say to each other in between are a few bytes over gloo, in a group of its own, and passes never wait for an
export. That is what keeps it from deadlocks with NCCL, too.

    bucket    tensors in one buffer, at most ``bucket_bytes`` unless one alone is larger
    piece     what one rank holds of one tensor (``engine.training.megatron_names``)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import msgspec
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from engine.generation.protocol import Bucket
from engine.generation.shareable import Address, map_address
from engine.training.megatron_inside.convert import held_tensors, size_of_region
from engine.training.megatron_inside.model import unwrapped
from engine.training.megatron_inside.overlap import Written
from engine.training.megatron_names import HEAD, HF_ROUTER_BIAS, Held, Region, hf_tensors
from engine.training.megatron_student import StudentShape
from engine.training.rank_work import ExportBuffers
from engine.transport.flat import Layout, TensorSpec, cut, dtype_of, lay_out, views

_ROOT = 0
_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(list[Address])


class _Copy(NamedTuple):
    """One piece on its way out."""

    source: Tensor
    """This rank's parameter."""
    here: Region
    """In it."""
    there: Region
    """In the whole tensor."""


class Exporter:
    """Made by all ranks together, when the weights have got their final place in memory.

    Args:
        chunks: this rank's.
        buffers: of rank 0: where buckets lie. Other ranks' are not used.

    Raises:
        RuntimeError: the ranks together do not hold every element of a version exactly once.
    """

    def __init__(self, chunks: Sequence[nn.Module], shape: StudentShape, *, buffers: ExportBuffers) -> None:
        config = unwrapped(chunks[0]).config
        self.specs = version_specs(shape, config.params_dtype)
        self._rank, self._num_ranks = dist.get_rank(), dist.get_world_size()
        self._buffers = buffers
        self._memories: dict[int, Tensor] = {}
        """Rank 0's buffers as this rank sees them, by number."""
        self._told: dict[int, int] = {}
        """By number of a buffer: which memory the other ranks take it for."""
        self._device = next(unwrapped(chunks[0]).parameters()).device
        self._stream: torch.cuda.Stream | None = None
        """Where copies go on a GPU: not with the passes, or a bucket would wait for all that is queued there."""
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._copies = _copies(chunks, shape, self.specs)
        self._group = dist.new_group(backend="gloo")
        self._check_complete()

    def buckets(self, *, bucket_bytes: int, written: Written | None = None) -> Iterator[Bucket]:
        """Collective: every rank iterates to the end, or all give up after the same bucket. Rank 0 gets the version,
        in the order of ``specs``; what the others get is empty.

        A bucket lies in one of the buffers that ``ExportBuffers`` takes in turn, so it is overwritten when rank 0 asks
        for the next but one.

        Args:
            written: when the weights hold the version; None: they do.
        """
        groups = cut([spec.num_bytes for spec in self.specs], limit=bucket_bytes)
        layouts = [lay_out(self.specs[group.start : group.stop]) for group in groups]
        num_bytes = max(layout.num_bytes for layout in layouts)
        if written is not None:
            written.wait(self._stream)
        for group, layout in zip(groups, layouts, strict=True):
            tensors = views(self._memory(num_bytes), layout)
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                for tensor, number in zip(tensors, group, strict=True):
                    for copy in self._copies[number]:
                        tensor[copy.there].copy_(copy.source.detach()[copy.here])
            if self._stream is not None:
                self._stream.synchronize()
            dist.barrier(self._group)
            yield _bucket(layout, tensors) if self._rank == _ROOT else Bucket(names=(), tensors=())

    def close(self) -> None:
        """Give the process group up; collective."""
        self._memories.clear()
        dist.destroy_process_group(self._group)

    def _memory(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8 of rank 0, which all ranks write to."""
        if self._rank == _ROOT:
            memory = self._buffers.take(num_bytes, self._device)
            number, life = self._buffers.taken
            addresses = b""
            if self._num_ranks > 1 and self._told.get(number) != life:
                # One for each: an address on a GPU is good for one mapping.
                addresses = _encode([self._buffers.address() for _ in range(self._num_ranks - 1)])
                self._told[number] = life
            self._broadcast(torch.tensor([number, len(addresses), memory.untyped_storage().nbytes()]))
            if addresses:
                self._broadcast(torch.frombuffer(bytearray(addresses), dtype=torch.uint8))
            return memory
        number, length, size = self._broadcast(torch.zeros(3, dtype=torch.int64)).tolist()
        if length:
            received = self._broadcast(torch.empty(length, dtype=torch.uint8))
            address = _decoder.decode(received.numpy().tobytes())[self._rank - 1]
            # Under the number that rank 0's device has here, too: all ranks see all devices.
            device = torch.device("cpu") if address.cuda is None else torch.device("cuda", 0)
            self._memories[number] = map_address(address, num_bytes=size, device=device)
        return self._memories[number]

    def _broadcast(self, tensor: Tensor) -> Tensor:
        dist.broadcast(tensor, _ROOT, group=self._group)
        return tensor

    def _check_complete(self) -> None:
        found = torch.tensor([sum(size_of_region(copy.there) for copy in copies) for copies in self._copies])
        dist.all_reduce(found, group=self._group)
        for spec, num_elements in zip(self.specs, found.tolist(), strict=True):
            if num_elements != _size_of(spec):
                raise RuntimeError(
                    f"the ranks together hold {num_elements} elements of {spec.name!r}, which has {_size_of(spec)}; "
                    "does the layout leave a parameter out that megatron_names expects?"
                )


def version_specs(shape: StudentShape, dtype: torch.dtype) -> list[TensorSpec]:
    """What a version consists of, in its order. ``dtype``: of the weights."""
    name_of = str(dtype).removeprefix("torch.")
    return [
        TensorSpec(name=name, dtype="float32" if name.endswith(HF_ROUTER_BIAS) else name_of, shape=size)
        for name, size in hf_tensors(shape).items()
    ]


def _copies(chunks: Sequence[nn.Module], shape: StudentShape, specs: Sequence[TensorSpec]) -> list[list[_Copy]]:
    """For each tensor, what this rank copies of it."""
    numbers = {spec.name: number for number, spec in enumerate(specs)}
    copies: list[list[_Copy]] = [[] for _ in specs]
    for name, tensor, parts in held_tensors(chunks, shape):
        if shape.is_tied and name == HEAD:
            continue  # the last stage's copy of the embedding
        replica, num_replicas = _replica(parts)
        for piece in parts.pieces:
            number = numbers[piece.name]
            if tensor.dtype != dtype_of(specs[number].dtype):
                raise RuntimeError(
                    f"Megatron's {name!r} is {tensor.dtype}, a version has it as {specs[number].dtype}; was the model "
                    "converted after it was built?"
                )
            if number % num_replicas == replica:
                copies[number].append(_Copy(tensor, piece.here, piece.there))
    return copies


def _replica(parts: Held) -> tuple[int, int]:
    """Which of so many ranks that hold the same pieces this one is."""
    if parts.is_expert:
        return parallel_state.get_expert_data_parallel_rank(), parallel_state.get_expert_data_parallel_world_size()
    rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    size = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    if parts.is_sharded:
        return rank, size
    tensor_size = parallel_state.get_tensor_model_parallel_world_size()
    return rank * tensor_size + parallel_state.get_tensor_model_parallel_rank(), size * tensor_size


def _bucket(layout: Layout, tensors: tuple[Tensor, ...]) -> Bucket:
    return Bucket(names=tuple(spec.name for spec in layout.specs), tensors=tensors)


def _size_of(spec: TensorSpec) -> int:
    return spec.num_bytes // dtype_of(spec.dtype).itemsize
