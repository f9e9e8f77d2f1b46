"""Reads what Weights & Biases wrote in offline mode, with the library's own messages.

The file is a log in LevelDB's format: seven bytes of header, then blocks of 32 KiB with pieces of records, each with
checksum, length and the place of the piece in its record.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

_BLOCK, _HEADER = 32 * 1024, 7
_WHOLE, _LAST = 1, 4


class OfflineRun(msgspec.Struct, kw_only=True):
    run_id: str = ""
    project: str = ""
    name: str = ""
    group: str = ""
    tags: list[str] = []
    config: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    exit_code: int | None = None


def read_offline_run(folder: Path) -> OfflineRun:
    """``folder`` is ``wandb/offline-run-…`` of a run."""
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    run = OfflineRun()
    for data in _records(path.read_bytes()):
        record = messages.Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.run_id, run.project = record.run.run_id, record.run.project
            run.name, run.group, run.tags = record.run.display_name, record.run.run_group, list(record.run.tags)
            run.config.update(_items(record.run.config.update))
        elif kind == "history":
            run.history.append(_items(record.history.item))
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B", "not a file of wandb"
    place, record = _HEADER, b""
    while place + _HEADER <= len(data):
        if _BLOCK - place % _BLOCK < _HEADER:  # no room for another piece: the block is filled up with zeros
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        if kind in (_WHOLE, _LAST):
            yield record
            record = b""
