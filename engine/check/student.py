"""The student's folder, and what is read with its tokenizer: prompts, and whether they and the answers fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from engine.check.asked import longest
from engine.errors import DataAbsent, DataError, RecipeError
from engine.model_folder import check_weights, read_config, stop_ids, vocab_size
from engine.prompt_files import read_rows
from engine.prompts import PromptSet, Tokenizer, load_prompts, load_tokenizer
from engine.recipe import DataConfig, EvalConfig, Recipe

# Of vLLM 0.32, by what its CPU backend says of itself; with another one it ends at its first token.
VLLM_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


class Student(msgspec.Struct, frozen=True, kw_only=True):
    """What the student's folder says of it."""

    config: Any
    """transformers config."""
    tokenizer: Tokenizer
    max_length: int
    """Positions that it has."""
    vocab_size: int
    """Rows of its output layer."""
    stop_ids: tuple[int, ...]
    weight_bytes: int


def read_student(recipe: Recipe) -> tuple[str, Student]:
    """Config and tokenizer; of the weights only how many bytes they are."""
    path, trust = recipe.student.path, recipe.student.trust_remote_code
    bring = recipe.bring.get(path)
    config = read_config(path, trust_remote_code=trust, role="student.path", bring=bring)
    tokenizer = load_tokenizer(path, trust_remote_code=trust)
    size = vocab_size(config, path=path, role="student.path")
    for stop_id in recipe.sampler.stop_ids or ():
        if not 0 <= stop_id < size:
            raise RecipeError(
                f"sampler.stop_ids has {stop_id}, the student's ids are 0 to {size - 1}; correct it, or set the field "
                "to null for the model's own end-of-sequence ids"
            )
    student = Student(
        config=config,
        tokenizer=tokenizer,
        max_length=getattr(config, "max_position_embeddings", None) or 1 << 30,
        vocab_size=size,
        stop_ids=stop_ids(path, config, role="student.path"),
        weight_bytes=sum(file.stat().st_size for file in Path(path).glob("*.safetensors")),
    )
    return f"{path}: {config.model_type}, vocabulary {size:,}", student


def look_at_weights(recipe: Recipe, student: Student) -> tuple[str, None]:
    path = recipe.student.path
    check_weights(student.config, path=path, role="student.path", bring=recipe.bring.get(path))
    return f"{student.weight_bytes / 2**20:,.0f} MiB, of the shapes that config.json says", None


def look_at_layout(recipe: Recipe) -> tuple[str, None]:
    """That a student whose config is there can be cut as the Megatron learner is told to."""
    from engine.training.megatron_student import check_layout, read_shape

    config = recipe.learner.megatron
    check_layout(read_shape(Path(recipe.student.path)), config)
    layout = (
        f"tensor {config.tensor_parallel} × pipeline {config.pipeline_parallel} × context {config.context_parallel} × "
        f"data {config.data_parallel}, expert {config.expert_parallel}"
    )
    return f"{layout}: the student fits {config.num_ranks} ranks", None


def look_at_heads(recipe: Recipe, student: Student) -> tuple[str, None]:
    """That vLLM can cut the student's attention as it is told to, and has kernels for it where it samples."""
    config, num_devices = student.config, recipe.sampler.vllm.tensor_parallel
    num_heads, hidden_size = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
    if num_heads is None or hidden_size is None:
        return "how many heads the student has is not known; vLLM looks at its start", None
    if num_heads % num_devices:
        raise RecipeError(
            f"sampler.vllm.tensor_parallel={num_devices} does not divide the student's {num_heads} attention heads; "
            "choose a number that does"
        )
    size = getattr(config, "head_dim", None) or hidden_size // num_heads
    is_latent = getattr(config, "kv_lora_rank", None) is not None
    if recipe.sampler.device == "cpu" and not is_latent and size not in VLLM_CPU_HEAD_SIZES:
        raise RecipeError(
            f"sampler.backend='vllm' on CPU has no attention for heads of {size}, as the student's are, only for those "
            f"of {', '.join(map(str, VLLM_CPU_HEAD_SIZES))}; sample with torch: --set sampler.backend=hf"
        )
    return f"{num_heads} attention heads on {num_devices} device{'s' * (num_devices > 1)}", None


def has_config(recipe: Recipe) -> bool:
    return (Path(recipe.student.path) / "config.json").is_file()


def read_prompts(recipe: Recipe, student: Student | None) -> tuple[str, PromptSet | None]:
    """The prompts; without a student, whose tokenizer counts them, what is wrong with any row of the file."""
    with _brought_by(recipe.bring.get(recipe.data.path)):
        if student is None:
            return _read_untokenized(recipe.data, name="data"), None
        prompts = load_prompts(
            recipe.data, student.tokenizer, max_reference_tokens=recipe.sampler.max_new_tokens, keep_text=False
        )
    return _counted(recipe.data.path, prompts), prompts


def read_held_out(recipe: Recipe, config: EvalConfig, student: Student | None) -> tuple[str, PromptSet | None]:
    """The same of the held-out prompts."""
    with _brought_by(recipe.bring.get(config.data.path)):
        if student is None:
            return _read_untokenized(config.data, name="evaluation.data"), None
        # References are scored, not sampled: they need only fit into a micro-batch.
        room = recipe.learner.micro_batch_tokens - config.data.max_prompt_tokens
        prompts = load_prompts(config.data, student.tokenizer, max_reference_tokens=room, name="evaluation.data")
    return _counted(config.data.path, prompts), prompts


def check_lengths(recipe: Recipe, student: Student) -> tuple[str, None]:
    most = longest(recipe)
    if most > student.max_length:
        raise RecipeError(
            f"prompts and answers may be {most} tokens long, the student has {student.max_length} positions; "
            "lower data.max_prompt_tokens or sampler.max_new_tokens"
        )
    limit = recipe.sampler.vllm.max_length if recipe.sampler.backend == "vllm" else None
    if limit is not None and most > limit:
        raise RecipeError(
            f"prompts and answers may be {most} tokens long, sampler.vllm.max_length={limit} is less; set it to null "
            "for as many as the recipe allows, or lower data.max_prompt_tokens or sampler.max_new_tokens"
        )
    return f"at most {most} tokens, the student has {student.max_length}", None


@contextmanager
def _brought_by(command: str | None) -> Iterator[None]:
    """Tell who misses a file the recipe's own command for it."""
    try:
        yield
    except DataAbsent as error:
        if command is None or error.bring is not None:
            raise
        remedy = f"{error.remedy}, as is fetched with: {command}"
        raise DataAbsent(error.what, remedy=remedy, bring=command) from error


def _read_untokenized(data: DataConfig, *, name: str) -> str:
    num_rows = sum(1 for _ in read_rows(data, name=name))
    if num_rows == 0:
        raise DataError(f"{name}.path={data.path!r}: no row in it is to be used; correct first_row, or the file")
    return f"{data.path}: {num_rows:,} rows, their tokens not counted without the student's tokenizer"


def _counted(path: str, prompts: PromptSet) -> str:
    filtered = f", {prompts.num_filtered:,} filtered" if prompts.num_filtered else ""
    return f"{path}: {len(prompts):,} prompts{filtered}"
