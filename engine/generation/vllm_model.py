"""Which tensors a version of the student consists of, told by its folder alone: the weights are in another process."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from engine.errors import ModelError
from engine.generation.version import TensorGroup, tensor_groups
from engine.recipe import StudentConfig


def tensor_groups_of(student: StudentConfig) -> list[TensorGroup]:
    """Names and shapes as the trainer exports them; takes no memory for weights.

    Raises:
        ModelError: the folder is missing or broken, or not a causal language model.
    """
    if not (Path(student.path) / "config.json").is_file():
        raise ModelError(f"student {student.path!r}: no config.json there; expected a folder in Hugging Face format")
    try:
        config = AutoConfig.from_pretrained(
            student.path, trust_remote_code=student.trust_remote_code, local_files_only=True
        )
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=student.trust_remote_code
            )
    except Exception as error:  # transformers and json raise a dozen kinds here; all mean this folder
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"student {student.path!r}: not a causal language model: {reason}") from error
    model.tie_weights()
    # vLLM loads layer by layer: one that gets only some of its tensors does not keep the others.
    return [group._replace(is_required=True) for group in tensor_groups(model)]
