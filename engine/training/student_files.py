"""The weights in a Hugging Face folder, read and written a piece at a time: no more of a model is in memory than is
asked for, or than a bucket holds. What the tensors are called is the checkpoint's; what they mean is decided elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import ModelError
from engine.generation.checkpoint_names import checkpoint_parts
from engine.generation.protocol import Bucket
from engine.transport.flat import TensorSpec, cut, dtype_of
from engine.transport.handoff import Ticket, consume

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
"""Of one file; what transformers writes."""

_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


class _Index(msgspec.Struct, frozen=True, kw_only=True):
    weight_map: dict[str, str]
    metadata: dict[str, Any] = {}


class WeightFiles:
    """The tensors of a folder; slices of them are read when they are asked for. Leave the context to close the files.

    Raises:
        ModelError: there are no safetensors files, or one is broken.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()
        index = folder / INDEX
        try:
            if index.is_file():
                self._file_of = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
            elif (folder / SINGLE).is_file():
                self._file_of = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
            else:
                raise ModelError(
                    f"student {str(folder)!r}: neither {SINGLE} nor {INDEX} there; weights are read from safetensors "
                    "files, so save the model with transformers' save_pretrained first"
                )
        except msgspec.MsgspecError as error:
            raise ModelError(f"student {str(folder)!r}: {INDEX} cannot be read: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()
        self._stack.close()

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, region: Sequence[slice]) -> Tensor:
        """[region] on CPU, in the file's dtype. Raises ModelError when the file is broken."""
        try:
            tensor: Tensor = self._slice(name)[tuple(region)]
        except SafetensorError as error:
            raise ModelError(f"student {str(self._folder)!r}: {name} cannot be read: {error}") from error
        return tensor

    def _slice(self, name: str) -> Any:
        return self._open(self._file_of[name]).get_slice(name)

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = self._stack.enter_context(safe_open(self._folder / file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ModelError(f"student {str(self._folder)!r}: {file} cannot be read: {error}") from error
        return self._files[file]


class _Place(NamedTuple):
    file: int
    """Which of the files."""
    offset: int
    """Of the first byte, in the file."""
    num_bytes: int


def write_weights(
    specs: Sequence[TensorSpec], buckets: Iterable[Bucket], folder: Path, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a version's tensors into ``folder`` as its buckets come, under the names that a checkpoint has.

    Args:
        specs: of all tensors to come: a file begins with what is in it.
        shard_bytes: a file that would be longer is begun anew; a larger tensor has a file of its own.

    Raises:
        ValueError: what came is not what ``specs`` said. The files are of no use then.
    """
    parts = [
        TensorSpec(name=part.name, dtype=spec.dtype, shape=part.shape)
        for spec in specs
        for part in checkpoint_parts(spec.name, spec.shape)
    ]
    groups = [parts[group.start : group.stop] for group in cut([part.num_bytes for part in parts], limit=shard_bytes)]
    names = (
        [SINGLE]
        if len(groups) == 1
        else [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    )
    places: dict[str, _Place] = {}
    with ExitStack() as stack:
        files = [stack.enter_context((folder / name).open("wb")) for name in names]
        for number, (file, group) in enumerate(zip(files, groups, strict=True)):
            _begin(file, group, number, places)
        for bucket in buckets:
            _write_bucket(bucket, files, places)
    if places:
        raise ValueError(f"{len(places)} tensors did not come, among them {next(iter(places))!r}")
    if len(groups) > 1:
        index = _Index(
            weight_map={part.name: names[i] for i, group in enumerate(groups) for part in group},
            metadata={"total_size": sum(part.num_bytes for part in parts)},
        )
        (folder / INDEX).write_bytes(msgspec.json.encode(index))


def _begin(file: BinaryIO, group: Sequence[TensorSpec], number: int, places: dict[str, _Place]) -> None:
    """The header of a file, and where its tensors go."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Wide elements first: readers map the file, and want every tensor to begin at a multiple of its elements' width.
    for spec in sorted(group, key=lambda spec: -dtype_of(spec.dtype).itemsize):
        offsets = [end, end + spec.num_bytes]
        header[spec.name] = {"dtype": _DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        end += spec.num_bytes
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for spec in group:
        offset = 8 + len(text) + header[spec.name]["data_offsets"][0]
        places[spec.name] = _Place(number, offset, spec.num_bytes)


def _write_bucket(bucket: Bucket, files: Sequence[BinaryIO], places: dict[str, _Place]) -> None:
    tensors = bucket.tensors
    if bucket.written is not None:
        tensors = consume(Ticket(tensors=tensors, device=tensors[0].device, event=bucket.written))
    for name, tensor in zip(bucket.names, tensors, strict=True):
        flat = tensor.detach().to("cpu").contiguous().view(-1)
        for part in checkpoint_parts(name, tuple(tensor.shape)):
            place = places.pop(part.name, None)
            data = flat[part.first_element : part.first_element + math.prod(part.shape)].view(torch.uint8)
            if place is None or len(data) != place.num_bytes:
                raise ValueError(f"{part.name!r} of {tensor.dtype} {part.shape} was not announced, or came twice")
            files[place.file].seek(place.offset)
            files[place.file].write(data.numpy().data)
