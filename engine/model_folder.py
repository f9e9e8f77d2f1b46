"""Whether config, weights and stop ids of a model folder fit together. Loads no weights.

The libraries that load a model raise almost anything for a broken folder; here each of them becomes one sentence.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from engine.errors import ModelAbsent, ModelError


def look_at_model(path: str, *, trust_remote_code: bool, role: str, bring: str | None = None) -> Any:
    """The transformers config of a model folder, once its weights are found to fit. As ``read_config``."""
    config = read_config(path, trust_remote_code=trust_remote_code, role=role, bring=bring)
    check_weights(config, path=path, role=role, bring=bring)
    return config


def read_config(path: str, *, trust_remote_code: bool, role: str, bring: str | None = None) -> Any:
    """The transformers config of a model folder.

    Args:
        role: the recipe's field, for the message.
        bring: the command that fetches the folder, if one is known.

    Raises:
        ModelAbsent: there is no such folder, or it has no config.
        ModelError: unreadable, or not a causal language model.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    folder = Path(path)
    if not folder.is_dir():
        raise _absent(f"{role} {path!r} is not a folder", path, bring)
    if not (folder / "config.json").is_file():
        raise _absent(f"{role} {path!r} has no config.json", path, bring)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # a wrong value surfaces as whatever it broke: ZeroDivisionError, a validator's own, …
        raise ModelError(
            f"{role} {path!r}: config.json cannot be used ({_one_line(error)}); restore it from the model's source"
        ) from error
    if not trust_remote_code and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(f"{role} {path!r} is a {config.model_type!r} model, expected a causal language model")
    return config


def check_weights(config: Any, *, path: str, role: str, bring: str | None = None) -> None:
    """Compare config and weights by name and shape: a model is made without memory, and every weight file's header is
    read. A file that was cut off does not pass.

    Raises:
        ModelAbsent: there are no weights.
        ModelError: they cannot be read, are not all there, or are of another shape.
    """
    folder = Path(path)
    if not any(folder.glob("*.safetensors")):
        raise _absent(f"{role} {path!r} has no *.safetensors", path, bring)
    stored = _stored_shapes(folder, role)
    # Code from the folder may not run without memory, and quantised weights have shapes of their own.
    if hasattr(config, "auto_map") or hasattr(config, "quantization_config"):
        return
    expected, tied = _expected_shapes(config, path, role=role)
    for name, shape in expected.items():
        # The loader renames, merges and transposes the tensors of some families: a name that only one side has, and
        # the order of the dimensions, are left to it.
        if name in stored and sorted(stored[name]) != sorted(shape):
            raise ModelError(
                f"{role} {path!r}: config.json asks for {name} of shape {list(shape)}, the weights have "
                f"{list(stored[name])}; they are not of one model, or config.json lacks fields"
            )
    missing = sorted(expected.keys() - stored.keys() - tied)
    # A file whose names are all the model's own is one that the loader renames nothing of.
    if missing and stored.keys() <= expected.keys():
        raise ModelError(
            f"{role} {path!r}: config.json asks for {len(missing)} weights that the files lack, among them "
            f"{missing[0]}; they are not of one model, or the copy is not complete"
        )


def _absent(what: str, path: str, bring: str | None) -> ModelAbsent:
    bring = bring or f"hf download OWNER/NAME --local-dir {shlex.quote(path)}"
    return ModelAbsent(
        what, remedy=f"expected a model in Hugging Face format, as is fetched with: {bring}", bring=bring
    )


def vocab_size(config: Any, *, path: str, role: str) -> int:
    """Rows of the output layer.

    Raises:
        ModelError: the config does not say.
    """
    size = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        raise ModelError(f"{role} {path!r}: config.json has no vocab_size; expected a causal language model")
    return size


def stop_ids(path: str, config: Any, *, role: str) -> tuple[int, ...]:
    """The end-of-sequence ids of the generation config, or else of the config; none when neither has any.

    Raises:
        ModelError: generation_config.json cannot be read, or the ids are not ids of the vocabulary.
    """
    file = Path(path) / "generation_config.json"
    ids: Any = None
    if file.is_file():
        try:
            generation = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{role}: {file} cannot be read ({error}); mend it or remove it") from error
        if not isinstance(generation, dict):
            raise ModelError(f"{role}: {file} holds {type(generation).__name__}, expected an object; mend or remove it")
        ids = generation.get("eos_token_id")
    if ids is None:
        ids = getattr(config, "eos_token_id", None)
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    size = vocab_size(config, path=path, role=role)
    for token_id in listed:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < size:
            raise ModelError(
                f"{role} {path!r}: eos_token_id is {json.dumps(ids)}, expected ids from 0 to {size - 1}; "
                "mend generation_config.json or config.json"
            )
    return tuple(listed)


def _stored_shapes(folder: Path, role: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the weight files. Reading a header compares the file's size with what it promises."""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    missing = sorted(_indexed_files(folder, role) - {file.name for file in files})
    if missing:
        raise ModelError(f"{role} {str(folder)!r} lacks {', '.join(missing)}; copy the folder again")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except Exception as error:  # SafetensorError is an Exception and nothing more
            raise ModelError(
                f"{role}: {file} ({file.stat().st_size:,} bytes) is damaged or was cut off ({_one_line(error)}); "
                "copy it again"
            ) from error
    return shapes


def _indexed_files(folder: Path, role: str) -> set[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return set()
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{role}: {index} cannot be read ({_one_line(error)}); copy it again") from error


def _expected_shapes(config: Any, path: str, *, role: str) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Names and shapes of the model's weights, and the names of those that are others of them, so not stored."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except Exception as error:  # as for reading the config
        raise ModelError(
            f"{role} {path!r}: no model can be made from config.json ({_one_line(error)}); "
            "restore it from the model's source"
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return shapes, set(model.all_tied_weights_keys)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
