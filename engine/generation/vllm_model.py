"""Which tensors a version of the student consists of, told by its folder alone: the weights are in another process."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from engine.adapter_files import adapter_shapes
from engine.errors import ModelError
from engine.generation.version import TensorGroup, tensor_groups
from engine.recipe import LoraConfig, StudentConfig


def tensor_groups_of(student: StudentConfig, lora: LoraConfig | None = None) -> list[TensorGroup]:
    """Names and shapes as the trainer exports them; takes no memory for weights.

    Args:
        lora: only the adapter is exported.

    Raises:
        ModelError: the folder is missing or broken, not a causal language model, or has no module for the adapter.
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
    if lora is not None:
        shapes = adapter_shapes(model, lora)
        if not shapes:
            raise ModelError(
                f"student {student.path!r} has no linear layers named {', '.join(lora.target_modules)}; correct "
                "learner.lora.target_modules"
            )
        return [TensorGroup((name,), shape, is_required=True) for name, shape in shapes.items()]
    model.tie_weights()
    # vLLM loads layer by layer: one that gets only some of its tensors does not keep the others.
    return [group._replace(is_required=True) for group in tensor_groups(model)]
