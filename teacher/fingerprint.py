"""When two tokenizers are the same one (same tokens, same ids), and when two folders hold the same weights.

Reads files as bytes: imports neither a tokenizer nor a tensor library, and decides nothing about what differs.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO, Final, Protocol

import msgspec

from engine.errors import ModelError

_NUM_SAMPLES: Final = 256
_SAMPLE_BYTES: Final = 4096


class Vocabulary(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id, added ones included."""
        ...


def fingerprint(tokenizer: Vocabulary) -> str:
    """Hex BLAKE2b (16 bytes) over the (token, id) pairs, sorted by id, then token.

    Equal for equal vocabularies on every machine and library version; a different, missing or moved token gives
    another one. Merges, normalisers and chat templates are not part of it: they change which ids a text becomes, not
    what an id means, and only ids go to the teacher.
    """
    digest = hashlib.blake2b(digest_size=16)
    for token, token_id in sorted(tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0])):
        # Byte-level vocabularies may hold lone surrogates.
        text = token.encode("utf-8", "surrogatepass")
        digest.update(token_id.to_bytes(8, "little", signed=True) + len(text).to_bytes(4, "little") + text)
    return digest.hexdigest()


def weights_fingerprint(folder: Path) -> str:
    """Hex BLAKE2b (16 bytes) over the weight files of a model folder: per file, in the order of their names, the (name,
    dtype, shape) of each tensor sorted by name, the size of the tensors' bytes, and 256 samples of 4 KiB of them,
    evenly spread, the first and the last bytes included. A file with less than that is read whole.

    It tells models apart, not an adversary from a friend: a model that was trained further, another size, dtype or seed
    changes nearly every tensor and so nearly every sample, but a change that is confined to the gaps, each 1/256 of a
    file, goes unseen. Neither the folder's name nor what else lies in it (config, tokenizer, the files' own metadata)
    is part of it; the same weights cut into other files give another fingerprint. A megabyte is read per file,
    whatever its size.

    Raises:
        ModelError: no weight files, or one that cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    path = folder
    try:
        paths = _weight_files(folder)
        if not paths:
            raise ModelError(f"model folder {str(folder)!r} has no weight files; expected model.safetensors, or shards")
        for path in paths:
            with path.open("rb") as file:
                _add_file(digest, file, is_safetensors=path.suffix == ".safetensors")
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        raise ModelError(f"{str(path)!r} cannot be read as weights: {error}; is the file complete?") from error
    return digest.hexdigest()


class _Index(msgspec.Struct):
    """Of a model in several files."""

    weight_map: dict[str, str]


class _Tensor(msgspec.Struct):
    """In the header of a safetensors file."""

    dtype: str
    shape: list[int]


def _weight_files(folder: Path) -> list[Path]:
    """Those that transformers loads; a folder may hold others."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            shards = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values()
            return [folder / shard for shard in sorted(set(shards))]
    return sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin")))


def _add_file(digest: hashlib.blake2b, file: BinaryIO, *, is_safetensors: bool) -> None:
    start, size = 0, file.seek(0, 2)
    if is_safetensors:
        file.seek(0)
        num_bytes = int.from_bytes(file.read(8), "little")
        if num_bytes > size:
            raise ValueError(f"its header claims {num_bytes} bytes of {size}")
        header = msgspec.json.decode(file.read(num_bytes), type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        for name in sorted(header):
            tensor = msgspec.json.decode(header[name], type=_Tensor)
            digest.update(repr((name, tensor.dtype, tensor.shape)).encode())
        start = 8 + num_bytes
    size -= start
    digest.update(f"{size} bytes;".encode())
    last = size - _SAMPLE_BYTES
    is_small = size <= _NUM_SAMPLES * _SAMPLE_BYTES
    places = [0] if is_small else [last * n // (_NUM_SAMPLES - 1) for n in range(_NUM_SAMPLES)]
    for place in places:
        file.seek(start + place)
        digest.update(file.read(size if is_small else _SAMPLE_BYTES))
