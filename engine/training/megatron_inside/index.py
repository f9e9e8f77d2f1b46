"""The index of a distributed checkpoint (``.metadata``), read so that it can say where tensors lie and nothing else.

torch writes it as a pickle, and unpickling runs whatever a file names. Here it may name the few plain records of which
such an index is made; anything else is refused before it is looked up. An entry that is no tensor is left out: torch
would unpickle what it points to. Tensors themselves torch reads with a reader of its own that knows tensors alone.
"""

from __future__ import annotations

import pickle
from pathlib import PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem as stored
from torch.distributed.checkpoint import metadata as records

from engine.errors import CheckpointError

_RECORDS = (
    records.Metadata,
    records.TensorStorageMetadata,
    records.BytesStorageMetadata,
    records.ChunkStorageMetadata,
    records.TensorProperties,
    records.MetadataIndex,
    records.StorageMeta,
    records._MEM_FORMAT_ENCODING,
    stored._StorageInfo,
)
_ALLOWED: dict[tuple[str, str], Any] = {
    **{(record.__module__, record.__qualname__): record for record in _RECORDS},
    ("torch", "Size"): torch.Size,
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in (torch.float32, torch.bfloat16)},
    ("torch.serialization", "_get_layout"): {"torch.strided": torch.strided}.__getitem__,
    # Where it was written: a name, of which nothing is opened. The second is Python 3.13's.
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
}


class IndexReader(stored.FileSystemReader):
    """torch's reader of such a folder, but for the index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> records.Metadata:
        """
        Raises:
            CheckpointError: the index names what no index of ours has.
            OSError, pickle.UnpicklingError and others: it is missing or broken.
        """
        with self.fs.create_stream(self.fs.concat_path(self.path, ".metadata"), "rb") as file:
            index = _Unpickler(file).load()
        if not isinstance(index, records.Metadata):
            raise CheckpointError(f"the index of {str(self.path)!r} is a {type(index).__name__} and no index")
        index.state_dict_metadata = {
            name: entry
            for name, entry in index.state_dict_metadata.items()
            if isinstance(entry, records.TensorStorageMetadata)
        }
        for place in (index.storage_data or {}).values():
            if PurePosixPath(place.relative_path).name != place.relative_path:
                raise CheckpointError(
                    f"the index of {str(self.path)!r} points to {place.relative_path!r}, which is not a file of this "
                    "folder; it is broken or was made to do harm: resume from another checkpoint"
                )
        index.storage_meta = index.storage_meta or records.StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


_InPython: Any = pickle._Unpickler
"""``Any``: its stubs do not say what is overridden here."""


class _Unpickler(_InPython):  # type: ignore[misc]
    """In Python, so that one of its instructions can be narrowed: the one that sets attributes of what is on the stack
    sets those of a class as well, and then it is another one for the whole process."""

    dispatch = dict(_InPython.dispatch)

    def load_build(self) -> None:
        if isinstance(self.stack[-2], type):
            raise CheckpointError(
                f"its index would change the class {self.stack[-2].__name__}; it was made to do harm: resume from "
                "another checkpoint"
            )
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        found = _ALLOWED.get((module, name))
        if found is None:
            raise CheckpointError(
                f"its index asks for {module}.{name}, which no index of ours does and which is not run; the file is "
                "broken or was made to do harm: resume from another checkpoint"
            )
        return found
