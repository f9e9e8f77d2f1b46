"""What ranks do in ``test_weights``; imports Megatron, so it is loaded in ranks alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.generation.protocol import Bucket
from engine.megatron_config import MegatronConfig
from engine.training.megatron_inside import parallel
from engine.training.megatron_inside.convert import load_hf
from engine.training.megatron_inside.gather import Exporter
from engine.training.megatron_inside.model import build_model, wrap
from engine.training.megatron_inside.save import save_student
from engine.training.megatron_student import check_layout, read_shape
from engine.transport.manifest import digest_of
from engine.transport.shared_arrays import SharedBuffers


def loaded(folder: Path, layout: Mapping[str, Any]) -> Exporter:
    """Of this rank's part of the student in ``folder``. It is made before there are weights, as when a run resumes."""
    config = MegatronConfig(**{"dtype": "float32", **layout})
    shape = read_shape(folder)
    check_layout(shape, config)
    parallel.initialize(config)
    chunks = [wrap(model, config) for model in build_model(shape, config)]
    for parameter in chunks[0].parameters():
        parameter.data.fill_(float("nan"))
    exporter = Exporter(chunks, shape, buffers=SharedBuffers())
    load_hf(chunks, folder, shape)
    return exporter


def fingerprints(buckets: Iterable[Bucket]) -> list[tuple[str, str]]:
    """Name and digest of bits, dtype and shape of each tensor; of rank 0 alone."""
    return [
        (name, digest_of([(name, tensor)]))
        for bucket in buckets
        for name, tensor in zip(bucket.names, bucket.tensors, strict=True)
    ]


def there_and_back(folder: Path, layout: Mapping[str, Any], saved: Path | None) -> list[list[tuple[str, str]]]:
    """Load, export twice with buckets of different sizes, and save if told where to."""
    exporter = loaded(folder, layout)
    found = [fingerprints(exporter.buckets(bucket_bytes=size)) for size in (1 << 12, 1 << 30)]
    if saved is not None:
        save_student(exporter, source=folder, folder=saved)
    exporter.close()
    return found
