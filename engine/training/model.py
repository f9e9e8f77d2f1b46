"""The student as the trainer needs it: loaded, checked, without dropout, split into trunk and head.

Knows nothing of losses and optimizers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine.errors import ModelError
from engine.recipe import Dtype, LearnerConfig, StudentConfig
from engine.training.batch import Layout, StudentBatch
from engine.training.embedding import RowGradEmbedding
from engine.training.packing import packing_obstacle, rope_obstacle

DTYPES: Mapping[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Student:
    """A causal language model with gradients, made by ``load_student``.

    The model stays in evaluation mode: the policy that is trained is the one that samples, and dropout would make a
    step depend on how it is cut into micro-batches.
    """

    def __init__(self, model: PreTrainedModel, *, layout: Layout, head: nn.Linear | None, autocast: bool) -> None:
        self.model = model
        self.layout: Layout = layout
        self.head = head
        """The output layer, when logits are just this linear layer of the last hidden state; else None."""
        self._autocast = autocast
        self._additive_mask = model.config._attn_implementation != "sdpa"
        self.parameters: tuple[nn.Parameter, ...] = tuple(model.parameters())

    @property
    def device(self) -> torch.device:
        return self.model.device

    def hidden(self, batch: StudentBatch) -> Tensor:
        """[T, D]: last hidden state at ``batch.rows``."""
        with self._precision():
            out = _trunk(self.model)(
                input_ids=batch.token_ids,
                position_ids=batch.position_ids,
                attention_mask=self._attention_mask(batch),
                use_cache=False,
            ).last_hidden_state
        selected: Tensor = out.flatten(0, 1).index_select(0, batch.rows)
        return selected

    def logits(self, batch: StudentBatch) -> Tensor:
        """[T, V]: the model's own logits at ``batch.rows``, for heads that are more than a linear layer."""
        with self._precision():
            out = self.model(
                input_ids=batch.token_ids,
                position_ids=batch.position_ids,
                attention_mask=self._attention_mask(batch),
                use_cache=False,
            ).logits
        selected: Tensor = out.flatten(0, 1).index_select(0, batch.rows)
        return selected

    def _attention_mask(self, batch: StudentBatch) -> Tensor | None:
        mask = batch.mask
        if mask is None or mask.dim() == 2 or not self._additive_mask:
            return mask
        dtype = torch.bfloat16 if self._autocast and self.device.type == "cuda" else self.model.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)

    def _precision(self) -> torch.autocast:
        enabled = self._autocast and self.device.type == "cuda"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)


def load_student(student: StudentConfig, config: LearnerConfig, *, folder: Path) -> Student:
    """Load ``folder`` and find out how it can be run; gradients of all parameters are there and zero.

    Args:
        student: dtype and trust; its path is only for messages when ``folder`` is a checkpoint.

    Raises:
        ModelError: the folder is missing, broken, not a causal language model, its device is not there, or it cannot be
            laid out as ``learner.packing`` says.
    """
    model = _read(student, config, folder)
    _silence_dropout(model, checkpointing=config.gradient_checkpointing)
    longest = config.micro_batch_tokens
    text_config = model.config.get_text_config()
    layout: Layout = config.packing
    if layout == "packed":
        obstacle = packing_obstacle(text_config, longest=longest)
        if obstacle is not None:
            raise ModelError(
                f"student {str(folder)!r} cannot run packed: {obstacle}; set learner.packing=padded, "
                "which suits any model"
            )
    elif rope_obstacle(text_config) is not None:
        layout = "single"
    result = Student(model, layout=layout, head=_linear_head(model), autocast=config.autocast)
    for parameter in result.parameters:
        parameter.requires_grad_(True)
        parameter.grad = torch.zeros_like(parameter)
    embedding = model.get_input_embeddings()
    if model.device.type == "cpu" and RowGradEmbedding.can_replace(embedding):
        model.set_input_embeddings(RowGradEmbedding.sharing(embedding))
    return result


def _read(student: StudentConfig, config: LearnerConfig, folder: Path) -> PreTrainedModel:
    where = f"student {str(folder)!r}"
    if not (folder / "config.json").is_file():
        raise ModelError(f"{where}: no config.json there; expected a folder in Hugging Face format")
    options: dict[str, Any] = {
        "dtype": DTYPES[student.dtype],
        "trust_remote_code": student.trust_remote_code,
        "local_files_only": True,
        "output_loading_info": True,
    }
    try:
        try:  # sdpa takes boolean masks and is the fastest everywhere; a model that has it not is loaded as it wants
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", **options)
        except (ValueError, ImportError):
            loaded = AutoModelForCausalLM.from_pretrained(folder, **options)
        model: PreTrainedModel = loaded[0].to(config.device)
    except Exception as error:  # transformers, safetensors, json and torch raise a dozen kinds; all mean this folder
        raise ModelError(f"{where}: not loadable as a causal language model: {_first_line(error)}") from error
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise ModelError(
            f"{where}: the weights lack {len(missing)} parameters that its config asks for, among them {missing[0]!r}; "
            "they would be random. Is the checkpoint complete?"
        )
    return model


def _silence_dropout(model: PreTrainedModel, *, checkpointing: bool) -> None:
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.eval()  # type: ignore[no-untyped-call]
    for module in model.modules():
        if checkpointing and getattr(module, "gradient_checkpointing", False):
            # Layers recompute only in training mode, so that is set for them alone, their own dropout at zero.
            module.training = True
            for name in ("dropout", "activation_dropout", "attention_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)


@torch.no_grad()
def _linear_head(model: PreTrainedModel) -> nn.Linear | None:
    """The output layer if it alone turns the trunk's last hidden state into logits: tried out, not looked up."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    trunk = _trunk(model)
    if not isinstance(head, nn.Linear) or trunk is model:
        return None
    ids = torch.arange(8, device=model.device).remainder_(head.out_features)[None]
    expected = model(input_ids=ids, use_cache=False).logits.float()
    hidden = getattr(trunk(input_ids=ids, use_cache=False), "last_hidden_state", None)
    if hidden is None or hidden.shape[-1] != head.in_features:
        return None
    found = nn.functional.linear(hidden, head.weight, head.bias).float()
    tolerance = 1e-4 if head.weight.dtype == torch.float32 else 2e-2
    close = found.shape == expected.shape and torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
    return head if close else None


def _trunk(model: PreTrainedModel) -> Any:
    return getattr(model, model.base_model_prefix, model)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
