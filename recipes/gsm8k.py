"""GSM8K's questions as prompts: what several recipes ask. Where the files lie, and the command that fetches them."""

from __future__ import annotations

import shlex
from pathlib import Path

from engine.recipe import DataConfig

NUM_HELD_OUT = 128


def questions(path: Path, *, num_rows: int | None = None) -> DataConfig:
    """The questions of one Parquet file in GSM8K's columns; those of more than 512 tokens are left out."""
    return DataConfig(
        path=str(path), prompt_column="question", max_prompt_tokens=512, too_long="filter", num_rows=num_rows
    )


def train(models: Path) -> DataConfig:
    return questions(models / "gsm8k/main/train-00000-of-00001.parquet")


def held_out(models: Path) -> DataConfig:
    return questions(models / "gsm8k/main/test-00000-of-00001.parquet", num_rows=NUM_HELD_OUT)


def bring(models: Path) -> dict[str, str]:
    """For ``Recipe.bring``."""
    command = f"hf download openai/gsm8k --repo-type dataset --local-dir {shlex.quote(str(models / 'gsm8k'))}"
    return {data.path: command for data in (train(models), held_out(models))}
