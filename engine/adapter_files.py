"""How a low-rank adapter is named and lies in a folder: peft's format, which peft, transformers and vLLM read.

Who trains one, and who computes with it, is decided elsewhere; peft is not needed here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.errors import CheckpointError
from engine.recipe import LoraConfig

_PREFIX = "base_model.model."
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def tensor_name(module: str, which: str) -> str:
    """Of one half of the adapter of ``module``: ``lora_A`` [rank, in] or ``lora_B`` [out, rank]."""
    return f"{_PREFIX}{module}.{which}.weight"


def adapter_shapes(model: nn.Module, lora: LoraConfig) -> dict[str, torch.Size]:
    """Name and shape of every tensor of an adapter of ``model``, which has none yet."""
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in lora.target_modules:
            shapes[tensor_name(name, "lora_A")] = torch.Size((lora.rank, module.in_features))
            shapes[tensor_name(name, "lora_B")] = torch.Size((module.out_features, lora.rank))
    return shapes


def write_adapter(folder: Path, tensors: Iterable[tuple[str, Tensor]], lora: LoraConfig) -> None:
    """Make ``folder`` and what belongs into it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors}, folder / _WEIGHTS)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.target_modules),
        "bias": "none",
        "inference_mode": True,
    }
    (folder / _CONFIG).write_bytes(msgspec.json.encode(config))


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors that ``write_adapter`` wrote.

    Raises:
        CheckpointError: missing or broken.
    """
    try:
        return load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the adapter in {str(folder)!r} cannot be read: {error}") from error
