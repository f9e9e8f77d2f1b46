"""Which floating-point format something is computed in, once its device is known.

bfloat16 has float32's range and 8 significant bits. Where the device multiplies it in hardware it costs a half to a
quarter of float32; where torch has to emulate it, more than float32. So "auto" asks the device.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from engine.recipe_fields import Autocast, ComputeDtype, Dtype

DTYPES: Mapping[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def compute_dtype(name: ComputeDtype, device: torch.device) -> torch.dtype:
    """What ``name`` means on ``device``; "auto" is bfloat16 where the device has it in hardware, float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    return DTYPES[name]


def is_autocast(mode: Autocast, device: torch.device) -> bool:
    """Whether matrix products of float32 weights are made in bfloat16 on ``device``."""
    return mode != "off" and (mode == "auto" or device.type != "cpu") and multiplies_bfloat16(device)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` has matrix products of bfloat16 in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # torch.cpu says this in private functions only; both exist since 2.6.
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
