"""From a Hugging Face folder to this rank's parameters: every rank reads what it holds and nothing else.

Which pieces those are is ``engine.training.megatron_names``'s to say; here they are found in the model and the files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from engine.errors import ModelError
from engine.generation.checkpoint_names import checkpoint_parts
from engine.training.megatron_inside.model import StudentModel, unwrapped
from engine.training.megatron_names import HF_HEAD, Held, Place, Region, held, hf_tensors, in_checkpoint
from engine.training.megatron_student import StudentShape
from engine.training.student_files import WeightFiles

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_NO_WEIGHTS = "_extra_state"
"""What TransformerEngine keeps beside the weights: states of fp8."""
_USELESS = re.compile(r".*\.rotary_emb\.inv_freq")
"""Computed from the config; old checkpoints have them."""


def place_of_rank() -> Place:
    """This rank's; the layout is initialised."""
    return Place(
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_size=parallel_state.get_expert_model_parallel_world_size(),
    )


def held_tensors(chunks: Sequence[nn.Module], shape: StudentShape) -> Iterator[tuple[str, Tensor, Held]]:
    """Every parameter and persistent buffer of this rank: name with the layer's number over all stages, itself, and
    what it is made of.

    Raises:
        KeyError: no rule knows one of them.
        RuntimeError: one has another shape than the student and the layout give it.
    """
    place = place_of_rank()
    for chunk in chunks:
        model = unwrapped(chunk)
        tensors: dict[str, Tensor] = dict(model.named_parameters())
        persistent = model.state_dict().keys()
        tensors |= {name: buffer for name, buffer in model.named_buffers() if name in persistent}
        for name, tensor in tensors.items():
            if name.endswith(_NO_WEIGHTS):
                continue
            full = _over_all_stages(model, name)
            parts = held(full, shape, place)
            if tuple(tensor.shape) != parts.shape:
                raise RuntimeError(
                    f"Megatron's {full!r} has shape {tuple(tensor.shape)} on this rank, the student's config gives it "
                    f"{parts.shape}; were experts or heads cut in a way that megatron_names does not know?"
                )
            yield full, tensor, parts


@torch.no_grad()
def load_hf(chunks: Sequence[nn.Module], folder: Path, shape: StudentShape) -> None:
    """Set all weights of this rank from the checkpoint in ``folder``; rows that only pad the vocabulary become zero.

    Every rank calls it; none waits for another. To be called when the model is wrapped (``model.wrap``), which would
    round what is float32 here, and before an optimizer copies the weights.

    Raises:
        ModelError: a tensor is missing in the files, has another shape, or none of Megatron's parameters takes it.
    """
    with WeightFiles(folder) as files:
        _check(files, folder, shape)
        for _, tensor, parts in held_tensors(chunks, shape):
            if sum(size_of_region(piece.here) for piece in parts.pieces) < tensor.numel():
                tensor.zero_()
            for piece in parts.pieces:
                source = in_checkpoint(piece, shape)
                tensor[piece.here].copy_(files.read(source.name, source.there))


def _check(files: WeightFiles, folder: Path, shape: StudentShape) -> None:
    expected = {
        part.name: part.shape for name, size in hf_tensors(shape).items() for part in checkpoint_parts(name, size)
    }
    where = f"student {str(folder)!r}"
    if missing := sorted(expected.keys() - files.names):
        raise ModelError(
            f"{where}: its weights lack {len(missing)} tensors, among them {missing[0]!r}; are config.json and weights "
            "of the same model?"
        )
    more = [name for name in sorted(files.names - expected.keys()) if not _is_left_out(name, shape)]
    if more:
        raise ModelError(
            f"{where}: no parameter of the Megatron model takes {len(more)} of its tensors, among them {more[0]!r}; "
            "learner.backend='hf' may know this architecture"
        )
    for name, size in expected.items():
        if files.shape(name) != size:
            raise ModelError(
                f"{where}: {name} has shape {files.shape(name)} in the files and {size} by config.json; are they of "
                "the same model?"
            )


def _is_left_out(name: str, shape: StudentShape) -> bool:
    """Known and not needed: a second copy of a tied head, and layers that predict further tokens (DeepSeek-V3's)."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    beyond = layer is not None and int(layer[1]) >= shape.num_layers
    return (name == HF_HEAD and shape.is_tied) or beyond or _USELESS.fullmatch(name) is not None


def _over_all_stages(model: StudentModel, name: str) -> str:
    """The name with the layer's number in the whole model."""
    match = _LAYER.match(name)
    if match is None:
        return name
    number = model.decoder.layers[int(match[1])].layer_number - 1
    return f"decoder.layers.{number}.{name[match.end() :]}"


def size_of_region(region: Region) -> int:
    """Elements."""
    return math.prod(one.stop - one.start for one in region)
