"""The student as a Hugging Face folder, written by rank 0 as buckets come: no rank ever holds the whole of it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch.distributed as dist

from engine.training.megatron_inside.gather import Exporter
from engine.training.saved import copy_companions
from engine.training.student_files import write_weights

_BUCKET_BYTES = 64 << 20
"""A few of the tensors of a small model, one of a large one."""


def save_student(exporter: Exporter, *, source: Path, folder: Path) -> None:
    """Write ``folder``, which transformers and vLLM load as it is. Collective.

    Args:
        source: the folder that the student came from: config, tokenizer and the like are its.
    """
    buckets = exporter.buckets(bucket_bytes=_BUCKET_BYTES)
    if dist.get_rank() != 0:
        for _ in buckets:
            pass
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(exporter.specs, buckets, folder)
    config = msgspec.json.decode((source / "config.json").read_bytes())
    # The one thing that may differ from the source: a student that was read as float32 is trained in bfloat16.
    config = {name: value for name, value in config.items() if name != "torch_dtype"}
    config["dtype"] = exporter.specs[0].dtype
    (folder / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(config), indent=2))
    copy_companions(source, folder)
