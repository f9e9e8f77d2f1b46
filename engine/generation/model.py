"""Which models can be decoded here, how one is loaded and made fast. Ends where the first token is sampled.

Any transformers causal language model whose attention takes keys and values from the ``Cache`` it is handed and masks
as it is told: that is tried out on the loaded model, not looked up in a list, and so is all that makes it faster.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine.errors import ModelError
from engine.generation.attention import decode_mask, use_slot_attention
from engine.generation.kv_cache import SlotCache
from engine.generation.lean import lean_step
from engine.generation.staging import StagingArea
from engine.generation.version import tensor_groups
from engine.packed_linear import pack_linears, unpack_linears
from engine.recipe import StudentConfig

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.03}
"""Share of the largest logit: what rounding can do, and far less than a wrong mask or position does."""


Step = Callable[[Tensor, Tensor, SlotCache], Tensor]
"""Ids [n] and positions [n] of the rows that ``SlotCache.begin_decode`` announced → logits [n, V]."""


class DecodableModel(NamedTuple):
    """A model ready for slots."""

    model: PreTrainedModel
    step: Step
    """One decode step of ``model``."""
    staging: StagingArea
    vocab_size: int
    max_positions: int | None
    """Tokens that prompt and answer may have together; None when the config sets no limit."""
    is_fast: bool
    """Runs on packed weights, slot attention or without its modules, where the machine and the model allow it."""


def load_decodable(student: StudentConfig, *, dtype: torch.dtype, device: torch.device) -> DecodableModel:
    """The model of ``student.path``, frozen, in evaluation mode, on ``device``; never from the network.

    Raises:
        ModelError: the folder is missing, broken, not a causal language model, or not one that can be decoded in slots.
    """
    model = _load(student, dtype=dtype, device=device)
    _check_architecture(model, path=student.path)
    groups = tensor_groups(model)
    expected = _plain_logits(model)
    linears, attention = pack_linears(model, device=device), use_slot_attention(model)
    lean = lean_step(model)
    is_fast = bool(linears) or attention is not None or lean is not None
    step: Step = _plain_step(model) if lean is None else lean
    try:
        _check_decoding(model, step, expected, path=student.path)
    except ModelError:
        if not is_fast:
            raise
        # Slow and right: the second check says whether it was the haste or the model.
        is_fast, step = False, _plain_step(model)
        unpack_linears(model, linears)
        if attention is not None:
            model.set_attn_implementation(attention)
        _check_decoding(model, step, expected, path=student.path)
    limit = getattr(model.config, "max_position_embeddings", None)
    return DecodableModel(
        model=model,
        step=step,
        staging=StagingArea(model, groups, device=device),
        vocab_size=_vocab_size(model),
        max_positions=int(limit) if limit else None,
        is_fast=is_fast,
    )


def trunk(model: PreTrainedModel) -> Any:
    """The model without its output layer: a prefill needs keys and values, no logits."""
    return getattr(model, model.base_model_prefix, model)


def _plain_step(model: PreTrainedModel) -> Step:
    """Through the model's own forward pass."""

    def step(ids_n: Tensor, positions_n: Tensor, cache: SlotCache) -> Tensor:
        output = model(
            input_ids=ids_n[:, None],
            position_ids=positions_n[:, None],
            attention_mask=decode_mask(positions_n, length=cache.length, dtype=model.dtype),
            past_key_values=cache,
            use_cache=True,
        )
        logits_nV: Tensor = output.logits[:, -1]
        return logits_nV

    return step


def _load(student: StudentConfig, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    folder = Path(student.path)
    if not (folder / "config.json").is_file():
        raise ModelError(f"student {student.path!r}: no config.json there; expected a folder in Hugging Face format")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=student.trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers, safetensors and json raise a dozen kinds here; all mean this folder
        raise ModelError(
            f"student {student.path!r}: cannot be loaded as a causal language model: {_first_line(error)}"
        ) from error
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise ModelError(
            f"student {student.path!r}: the weights lack {len(missing)} parameters that its config asks for, "
            f"among them {missing[0]!r}; they would be random"
        )
    model.to(device)  # type: ignore[arg-type]
    model.eval()  # type: ignore[no-untyped-call]
    model.requires_grad_(False)
    return model


def _check_architecture(model: PreTrainedModel, *, path: str) -> None:
    """Refuse by name what cannot be decoded in slots."""
    config = model.config
    name = f"student {path!r} ({config.model_type})"
    wanted = "this generator decodes models whose layers all attend to the whole sequence"
    layer_types = getattr(config, "layer_types", None)
    others = sorted({kind for kind in layer_types or () if kind != "full_attention"})
    if others:
        raise ModelError(f"{name} has {', '.join(others)} layers; {wanted}")
    if layer_types is None and getattr(config, "sliding_window", None):
        raise ModelError(f"{name} attends to a sliding window of {config.sliding_window} tokens; {wanted}")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} has an encoder; expected a causal language model")


def _probe_sequences(vocab_size: int) -> list[list[int]]:
    """Unequal lengths: equal ones would not notice a mask that is ignored."""
    return [[(7 * place + 3) % vocab_size for place in range(length)] for length in (6, 3)]


@torch.inference_mode()
def _plain_logits(model: PreTrainedModel) -> Tensor:
    """[n, V] after the last token of each probe sequence, one forward pass each, no cache."""
    rows = [
        model(input_ids=torch.tensor([sequence], device=model.device), use_cache=False).logits[0, -1]
        for sequence in _probe_sequences(_vocab_size(model))
    ]
    return torch.stack(rows).float()


@torch.inference_mode()
def _check_decoding(model: PreTrainedModel, step: Step, expected_nV: Tensor, *, path: str) -> None:
    name = f"student {path!r} ({model.config.model_type})"
    try:
        logits_nV = _slot_logits(model, step).float()
    except Exception as error:  # whatever a model does with a cache or a mask that it does not know
        raise ModelError(f"{name} cannot be decoded in slots: {_first_line(error)}") from error
    share = float((expected_nV - logits_nV).abs().max() / expected_nV.abs().max().clamp_min(1e-6))
    tolerance = _TOLERANCE[model.dtype]
    if not share <= tolerance:
        raise ModelError(
            f"{name}: decoding in slots differs from a plain forward pass by {share:.2g} of the largest logit, where "
            f"{tolerance} could be rounding; its attention does not follow the positions or the mask that it is given"
        )


def _slot_logits(model: PreTrainedModel, step: Step) -> Tensor:
    """The same as ``_plain_logits`` by a ragged prefill and two decode steps."""
    sequences, device = _probe_sequences(_vocab_size(model)), model.device
    num, width = len(sequences), max(map(len, sequences)) - 2
    rows = torch.arange(num, device=device)
    cache = SlotCache(num_slots=num)
    known = torch.tensor([(s[:-2] + [0] * width)[:width] for s in sequences], device=device)
    places = torch.arange(width, device=device).expand(num, -1)
    cache.begin_prefill(rows=rows, sources=rows, length=width)
    trunk(model)(input_ids=known, position_ids=places, past_key_values=cache, use_cache=True)
    logits = torch.empty(0)
    for back in (2, 1):
        positions = torch.tensor([len(s) - back for s in sequences], device=device)
        cache.begin_decode(rows=rows, positions=positions, length=int(positions.max()) + 1)
        logits = step(torch.tensor([s[-back] for s in sequences], device=device), positions, cache)
    return logits


def _vocab_size(model: PreTrainedModel) -> int:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
