"""The student as the trainer needs it: loaded, checked, without dropout, split into trunk and head.

Knows nothing of losses and optimizers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine.errors import ModelError
from engine.precision import DTYPES, is_autocast
from engine.recipe import LearnerConfig, StudentConfig
from engine.training.adapter import add_adapter
from engine.training.batch import Layout, ModelInputs, lay_out, upload
from engine.training.embedding import RowGradEmbedding
from engine.training.packing import packing_obstacle, rope_obstacle
from engine.training.rms_norm import use_own_norms
from engine.training.tree_attention import NAME as TREE_ATTENTION
from engine.transport.handoff import Uploader


class Student:
    """A causal language model with gradients, made by ``load_student``.

    The model stays in evaluation mode: the policy that is trained is the one that samples, and dropout would make a
    step depend on how it is cut into micro-batches.

    Args:
        autocast: passes with gradients make their matrix products in bfloat16; passes without stay exact.
    """

    def __init__(self, model: PreTrainedModel, *, layout: Layout, autocast: bool = False) -> None:
        self.model = model
        self.layout: Layout = layout
        self.head = _linear_head(model)
        """The output layer, when logits are just this linear layer of the last hidden state; else None."""
        self.training_dtype = torch.bfloat16 if autocast else model.dtype
        """Of the matrix products, and of ``hidden``, where gradients are recorded."""
        self._additive_mask = model.config._attn_implementation not in ("sdpa", TREE_ATTENTION)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def hidden(self, inputs: ModelInputs) -> Tensor:
        """[rows · L, D]: the last hidden states."""
        hidden: Tensor = self._run(_trunk(self.model), inputs).last_hidden_state
        return hidden.flatten(0, 1).to(self._dtype)

    def logits(self, inputs: ModelInputs) -> Tensor:
        """[rows · L, V]: the model's own logits, for heads that are more than a linear layer."""
        logits: Tensor = self._run(self.model, inputs).logits
        return logits.flatten(0, 1)

    def _run(self, module: Any, inputs: ModelInputs) -> Any:
        options: dict[str, Any] = {} if inputs.tree is None else {"tree": inputs.tree}
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._dtype != self.model.dtype):
            return module(
                input_ids=inputs.token_ids,
                position_ids=inputs.position_ids,
                attention_mask=self._attention_mask(inputs),
                use_cache=False,
                **options,
            )

    def _attention_mask(self, inputs: ModelInputs) -> Tensor | None:
        mask = inputs.mask
        if mask is None or mask.dim() == 2 or not self._additive_mask:
            return mask
        dtype = self._dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)

    @property
    def _dtype(self) -> torch.dtype:
        return self.training_dtype if torch.is_grad_enabled() else self.model.dtype


def load_student(student: StudentConfig, config: LearnerConfig, *, folder: Path) -> Student:
    """Load ``folder`` and find out how it can be run; gradients of all parameters that are trained are there and zero.

    Raises:
        ModelError: the folder is missing, broken, not a causal language model, its device is not there, or it cannot be
            laid out as ``learner.packing`` says.
    """
    model = _read(student, config, folder)
    autocast = is_autocast(config.autocast, model.device)
    if model.device.type == "cpu":
        use_own_norms(model)
    _silence_dropout(model, checkpointing=config.gradient_checkpointing)
    if config.packing == "packed":
        result = _packed(model, config, autocast=autocast, where=f"student {str(folder)!r}")
    else:
        is_alone = rope_obstacle(model.config.get_text_config()) is not None
        result = Student(model, layout="single" if is_alone else "padded", autocast=autocast)
    if config.lora is None:
        model.requires_grad_(True)
    else:
        add_adapter(model, config.lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    embedding = model.get_input_embeddings()
    is_trained = embedding.weight.requires_grad
    if is_trained and model.device.type == "cpu" and RowGradEmbedding.can_replace(embedding):
        model.set_input_embeddings(RowGradEmbedding.sharing(embedding))
    return result


def _packed(model: PreTrainedModel, config: LearnerConfig, *, autocast: bool, where: str) -> Student:
    """The fastest packed layout in which the model computes what it computes for single sequences."""
    obstacle = packing_obstacle(model.config.get_text_config(), longest=config.micro_batch_tokens)
    attention = model.config._attn_implementation
    if obstacle is None and attention == "sdpa" and model.device.type == "cpu":
        model.set_attn_implementation(TREE_ATTENTION)
        by_branch = Student(model, layout="tree", autocast=autocast)
        if model.config._attn_implementation == TREE_ATTENTION and _packs_rightly(by_branch):
            return by_branch
        model.set_attn_implementation(attention)
    if obstacle is None:
        by_mask = Student(model, layout="packed", autocast=autocast)
        if _packs_rightly(by_mask):
            return by_mask
        obstacle = "its hidden states for packed sequences differ from those for separate ones"
    raise ModelError(f"{where} cannot run packed: {obstacle}; set learner.packing=padded, which suits any model")


@torch.no_grad()
def _packs_rightly(student: Student) -> bool:
    """Whether a small branched trie gives the hidden states of its sequences one by one."""
    uploader = Uploader(student.device)
    num_ids = student.model.config.get_text_config().vocab_size
    # Two that share a prefix, and a shorter one that shares nothing.
    sequences = [[token_id % num_ids for token_id in ids] for ids in ((1, 2, 3, 4, 5), (1, 2, 6, 7), (8, 9, 10))]
    plain = Student(student.model, layout="single")
    batch = lay_out(sequences, student.layout)
    try:
        packed = student.hidden(upload(batch, layout=student.layout, uploader=uploader)[0])
    except Exception:  # whatever a model does with arguments that it does not know: this layout is not for it
        return False
    for sequence, index in zip(sequences, batch.index, strict=True):
        alone = lay_out([sequence], "single")
        expected = plain.hidden(upload(alone, layout="single", uploader=uploader)[0]).float()
        found = packed[torch.from_numpy(index).to(student.device)].float()
        # A wrong mask is off by a tenth of the spread and more; rounding by 1e-6, in half precision 1e-2.
        tolerance = (1e-3 if student.model.dtype == torch.float32 else 0.05) * float(expected.std())
        if not float((found - expected).abs().max()) <= tolerance:
            return False
    return True


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
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise ModelError(f"{where}: {name} holds numbers that are not finite; take another checkpoint of the model")
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
