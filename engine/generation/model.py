"""Which models can be decoded here, and how one is loaded. Ends where the first token is sampled.

Any transformers causal language model whose attention takes keys and values from the ``Cache`` it is handed and masks as it
is told: that is tried out on the loaded model, not looked up in a list.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine.errors import ModelError
from engine.generation.kv_cache import SlotCache
from engine.recipe import Dtype, StudentConfig

DTYPES: Mapping[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.03}
"""Share of the largest logit: what rounding can do, and far less than a wrong mask or position does."""


def load_model(student: StudentConfig, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model of ``student.path``, frozen, in evaluation mode, on ``device``; never from the network.

    Raises:
        ModelError: the folder is missing, broken, or not a causal language model.
    """
    folder = Path(student.path)
    if not (folder / "config.json").is_file():
        raise ModelError(f"student {student.path!r}: no config.json there; expected a folder in Hugging Face format")
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=student.trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers, safetensors and json raise a dozen kinds here; all mean this folder
        raise ModelError(
            f"student {student.path!r}: not loadable as a causal language model: {_first_line(error)}"
        ) from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ModelError(
            f"student {student.path!r}: the weights lack {len(missing)} parameters that its config asks for, "
            f"among them {missing[0]!r}; they would be random"
        )
    model.to(device)
    model.eval()
    model.requires_grad_(False)
    checked: PreTrainedModel = model
    return checked


def max_positions(model: PreTrainedModel) -> int | None:
    """Tokens that prompt and answer may have together; None when the config sets no limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return int(limit) if limit else None


def check_architecture(model: PreTrainedModel, *, path: str) -> None:
    """Refuse by name what cannot be decoded in slots.

    Raises:
        ModelError: sliding or chunked windows, recurrent layers, an encoder.
    """
    config = model.config
    kind = getattr(config, "model_type", type(model).__name__)
    others = sorted({t for t in getattr(config, "layer_types", None) or () if t != "full_attention"})
    if others:
        raise ModelError(
            f"student {path!r} ({kind}) has {', '.join(others)} layers; this generator decodes models whose layers all "
            "attend to the whole sequence"
        )
    if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None):
        raise ModelError(
            f"student {path!r} ({kind}) attends to a sliding window of {config.sliding_window} tokens; this generator "
            "decodes models whose layers all attend to the whole sequence"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"student {path!r} ({kind}) has an encoder; expected a causal language model")


@torch.inference_mode()
def probe(model: PreTrainedModel, *, path: str) -> None:
    """Decode a few tokens of two unequal sequences in slots and compare with plain forward passes.

    Raises:
        ModelError: the two disagree, or the model cannot work with the cache at all.
    """
    device = model.device
    vocab = model.get_input_embeddings().weight.shape[0]
    sequences = [[(7 * i + 3) % vocab for i in range(n)] for n in (6, 3)]
    plain = torch.stack([model(input_ids=torch.tensor([s], device=device)).logits[0, -1] for s in sequences]).float()
    try:
        slotted = _decode_last_two(model, sequences).float()
    except Exception as error:  # whatever a model does with a cache that it does not know
        raise ModelError(
            f"student {path!r} ({model.config.model_type}) cannot decode with a slot cache: {_first_line(error)}"
        ) from error
    error_share = float((plain - slotted).abs().max() / plain.abs().max().clamp_min(1e-6))
    tolerance = _PROBE_TOLERANCE.get(model.dtype, 0.15)
    if not error_share <= tolerance:
        raise ModelError(
            f"student {path!r} ({model.config.model_type}): decoding in slots differs from a plain forward pass by "
            f"{error_share:.2g} of the largest logit, at most {tolerance} is rounding; its attention does not follow the "
            "positions or the mask that it is given"
        )


def decode_mask(positions_n: Tensor, *, length: int, dtype: torch.dtype) -> Tensor:
    """[n, 1, 1, length] additive: 0 up to and with a row's position, the lowest number after it.

    Additive suits eager and sdpa attention alike; the lowest number instead of −inf cannot make a NaN.
    """
    hidden_nL = torch.arange(length, device=positions_n.device) > positions_n[:, None]
    mask_nL = torch.zeros(hidden_nL.shape, dtype=dtype, device=positions_n.device)
    return mask_nL.masked_fill_(hidden_nL, torch.finfo(dtype).min)[:, None, None, :]


def trunk(model: PreTrainedModel) -> Any:
    """The model without its output layer: a prefill needs keys and values, no logits."""
    return getattr(model, model.base_model_prefix, model)


def _decode_last_two(model: PreTrainedModel, sequences: list[list[int]]) -> Tensor:
    device, num = model.device, len(sequences)
    cache = SlotCache(num_slots=num + 1)
    rows = torch.arange(num, device=device)
    width = max(map(len, sequences)) - 2
    known = torch.tensor([(s[:-2] + [0] * width)[:width] for s in sequences], device=device)
    cache.begin_prefill(rows=rows, sources=rows, length=width)
    places = torch.arange(width, device=device).expand(num, -1)
    trunk(model)(input_ids=known, position_ids=places, past_key_values=cache, use_cache=True)
    logits = torch.empty(0)
    for back in (2, 1):
        positions = torch.tensor([len(s) - back for s in sequences], device=device)
        length = int(positions.max()) + 1
        cache.begin_decode(rows=rows, positions=positions, length=length)
        logits = model(
            input_ids=torch.tensor([[s[-back]] for s in sequences], device=device),
            position_ids=positions[:, None],
            attention_mask=decode_mask(positions, length=length, dtype=model.dtype),
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    return logits


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
