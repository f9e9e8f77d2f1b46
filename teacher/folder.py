"""What a teacher's model folder says of itself before any weight is read; the same for every back end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from engine.errors import ModelError
from teacher.fingerprint import fingerprint, weights_fingerprint
from teacher.protocol import PROTOCOL, TeacherInfo


def read_config(folder: Path, *, trust_remote_code: bool) -> tuple[Any, Any]:
    """Config and tokenizer.

    Raises:
        ModelError: one of them is missing or broken.
    """
    name = str(folder)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model folder {name!r} has no config.json; "
            "expected a folder in Hugging Face format (config, weights, tokenizer)"
        )
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **options)
        return config, AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:
        raise ModelError(f"config or tokenizer in {name!r} cannot be read: {one_line(error)}") from error


def refuse_quantised(config: Any, *, folder: Path, is_allowed: bool) -> None:
    """A teacher is what the student is to become: the loss of a quantised one is learnt as well.

    Raises:
        ModelError: the checkpoint is quantised, and that was not said to be meant.
    """
    found = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if found is None or is_allowed:
        return
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    raise ModelError(
        f"the model in {str(folder)!r} is quantised ({method or 'by an unnamed method'}), and so would be what the "
        "student learns; use the original weights, or say that it is meant: python -m teacher --allow-quantised"
    )


def length_limit(config: Any, wanted: int | None, *, folder: Path) -> int:
    """Tokens of prompt and response together: ``wanted``, or the model's own limit.

    Raises:
        ModelError: the model says no limit and none is wanted, or has fewer positions than are wanted.
    """
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    if wanted is None:
        if own is None:
            raise ModelError(f"model in {str(folder)!r} does not say how long its inputs may be; set --max-length")
        return int(own)
    if own is not None and wanted > own:
        raise ModelError(f"max_length={wanted} is more than the {own} positions of the model in {str(folder)!r}")
    return wanted


def info_of(folder: Path, tokenizer: Any, *, vocab_size: int, max_length: int, max_top_k: int | None) -> TeacherInfo:
    """What ``/v1/info`` answers for this folder."""
    return TeacherInfo(
        model=folder.resolve().name,
        vocab_size=vocab_size,
        tokenizer_size=len(tokenizer.get_vocab()),
        tokenizer_fingerprint=fingerprint(tokenizer),
        max_length=max_length,
        max_top_k=vocab_size if max_top_k is None else min(max_top_k, vocab_size),
        protocol=PROTOCOL,
        weights_fingerprint=weights_fingerprint(folder),
    )


def one_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
