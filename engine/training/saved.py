"""What a trainer leaves on disk and finds again: no pickle, nothing that needs this program to read the weights.

    student/     config, weights (safetensors), tokenizer, generation config: loads with transformers as it is
    adapter/     with learner.lora: what was trained, in peft's format; student/ has it merged in
    trainer/     optimizer.safetensors, and state.json with the step

There is no random state to keep: what a model draws comes from streams of seed and step (``engine.streams``).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from engine.errors import CheckpointError

STUDENT, ADAPTER, TRAINER = "student", "adapter", "trainer"

_COMPANIONS = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"})
_OWN = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")


class TrainerState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: int = 1
    version: int
    """Optimizer steps done, skipped ones too: the place in the learning rate schedule."""


def save_student(
    model: PreTrainedModel, source: Path, folder: Path, *, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write ``folder`` in Hugging Face format; the tokenizer's files are copied from ``source`` as they are.

    Args:
        weights: to be written instead of the model's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = model.generation_config
    if (source / "generation_config.json").is_file():
        # Copied below: save_pretrained refuses some generation configs that from_pretrained has just read.
        model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        model.save_pretrained(folder, state_dict=None if weights is None else dict(weights))
    finally:
        model.generation_config = own
    copy_companions(source, folder)


def copy_companions(source: Path, folder: Path) -> None:
    """What belongs to a model beside config and weights: tokenizer, templates, generation config."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in _COMPANIONS and path.name not in _OWN:
            shutil.copyfile(path, folder / path.name)


def save_trainer(folder: Path, *, optimizer: Mapping[str, Tensor], state: TrainerState) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in optimizer.items()}, folder / "optimizer.safetensors")
    (folder / "state.json").write_bytes(msgspec.json.encode(state))


def load_trainer(folder: Path) -> tuple[dict[str, Tensor], TrainerState]:
    """Read back what ``save_trainer`` wrote.

    Raises:
        CheckpointError: a file is missing or broken, or of another version of this program.
    """
    try:
        state = msgspec.json.decode((folder / "state.json").read_bytes(), type=TrainerState)
        optimizer = load_file(folder / "optimizer.safetensors")
    except (OSError, msgspec.MsgspecError, SafetensorError) as error:
        raise CheckpointError(f"trainer state in {str(folder)!r} cannot be read: {error}") from error
    if state.format != 1:
        raise CheckpointError(
            f"trainer state in {str(folder)!r} has format {state.format}, this program reads 1; resume with the "
            "program that wrote it"
        )
    return optimizer, state
