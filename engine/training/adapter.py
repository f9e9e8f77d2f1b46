"""A low-rank adapter in the student: put in by peft, given out alone or merged, kept beside the checkpoint.

W + alpha / rank · B A stands in for W in each of the modules that the recipe names. A [rank, in] is random and B
[out, rank] zero, so the student begins as it is. Only A and B have gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.adapter_files import tensor_name
from engine.errors import CheckpointError, ModelError
from engine.recipe import LoraConfig
from engine.streams import stream_key
from engine.training.export import named_tensors

_NAME = "default"
"""Among the adapters of a model; there is one."""
_HALVES = ("lora_A", "lora_B")


def add_adapter(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Put a fresh one in; equal recipes give equal bits.

    Raises:
        ModelError: peft is not installed, or the model has no such modules.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise ModelError(f"learner.lora needs peft ({error}): pip install 'slipstream[lora]'") from error
    config = PeftConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.target_modules), lora_dropout=0.0, bias="none"
    )
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(stream_key("lora"))
        try:
            inject_adapter_in_model(config, model, adapter_name=_NAME)
        except ValueError as error:
            raise ModelError(f"learner.lora.target_modules={list(lora.target_modules)}: {error}") from error


def adapter_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The adapter's own, under the names of its files; they share memory with the model."""
    for name, layer in _layers(model):
        for half in _HALVES:
            yield tensor_name(name, half), getattr(layer, half)[_NAME].weight.detach()


@torch.no_grad()
def load_adapter(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Take over what ``adapter_tensors`` gave.

    Raises:
        CheckpointError: it is of another model or rank.
    """
    own = dict(adapter_tensors(model))
    odd = sorted(name for name in own.keys() | tensors.keys() if _shape(own, name) != _shape(tensors, name))
    if odd:
        raise CheckpointError(
            f"the saved adapter and learner.lora disagree on {len(odd)} tensors, among them {odd[0]!r}; resume with "
            "the rank and modules that the run began with"
        )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def merged_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """What the student would be without an adapter that computes the same, as ``named_tensors`` of such a model.
    Adapted tensors are made one at a time, the others share memory with the model."""
    layers = {f"{name}.base_layer.weight": layer for name, layer in _layers(model)}
    for name, tensor in named_tensors(model):
        if any(f".{half}." in name for half in _HALVES):
            continue
        layer = layers.get(name)
        if layer is not None:
            tensor = tensor + layer.get_delta_weight(_NAME).detach()
        yield name.replace(".base_layer.", "."), tensor


def _layers(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None
