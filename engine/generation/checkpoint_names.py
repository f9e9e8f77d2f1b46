"""Under which names a checkpoint holds what transformers holds as one tensor: mixture-of-experts layers.

transformers 5 fuses the experts of a layer; checkpoints, and engines that load them, have a tensor per expert and
projection. Each of those is a contiguous piece of the fused one, so nothing is copied to cut it.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class CheckpointPart(NamedTuple):
    """A contiguous piece of a tensor."""

    name: str
    shape: tuple[int, ...]
    first_element: int


def checkpoint_parts(name: str, shape: tuple[int, ...]) -> list[CheckpointPart]:
    """The tensors of a checkpoint that make up the tensor ``name``; most often it alone.

    ``….experts.gate_up_proj`` [E, 2 I, D] becomes ``….experts.e.gate_proj.weight`` and ``up_proj`` [I, D];
    ``….experts.down_proj`` [E, D, I] becomes ``….experts.e.down_proj.weight`` [D, I].
    """
    prefix, _, last = name.rpartition(".")
    if not prefix.endswith(".experts") or len(shape) != 3:
        return [CheckpointPart(name, shape, 0)]
    num_experts, rows, width = shape
    projections = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(last)
    if projections is None:
        return [CheckpointPart(name, shape, 0)]
    part_shape = (rows // len(projections), width)
    size = math.prod(part_shape)
    return [
        CheckpointPart(f"{prefix}.{expert}.{projection}.weight", part_shape, (expert * len(projections) + i) * size)
        for expert in range(num_experts)
        for i, projection in enumerate(projections)
    ]
