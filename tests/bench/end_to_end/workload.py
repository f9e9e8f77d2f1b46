"""What all contenders of ``bench_end_to_end`` are given: models, prompts, batch, and how they say what it cost.

No side chooses anything here: a contender reads the folder that ``make`` wrote and does ``NUM_PROMPTS`` answers of
``NEW_TOKENS`` tokens each step. There is no end-of-sequence token, so every answer has that length.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.models import PAD_ID, tiny_model, write_jsonl

NUM_PROMPTS = 32
NEW_TOKENS = 64
PROMPT_TOKENS = (24, 32)
"""Shortest and longest."""

LR, BETAS, GRAD_CLIP = 1e-5, (0.9, 0.95), 1.0
"""AdamW without decay, for all."""

STUDENT = {"hidden": 128, "layers": 4, "heads": 4, "kv_heads": 2, "seed": 2}
TEACHER = {"hidden": 256, "layers": 8, "heads": 8, "kv_heads": 4, "seed": 1}

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""TRL wants one: here a conversation is the text of its messages, so that all see the same tokens."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One optimizer step of one contender."""

    cpu_s: float
    """Of the whole process, since the end of the step before."""
    num_tokens: int
    """Response tokens that the loss was taken over."""
    loss: float
    """Nats per token."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a contender's process has to say."""

    steps: list[Step]
    """From the second on: the first pays for what is lazy."""

    @property
    def cpu_us_per_token(self) -> float:
        """All steps together: a step's work may lie partly in the interval of its neighbour."""
        return 1e6 * sum(step.cpu_s for step in self.steps) / sum(step.num_tokens for step in self.steps)


def make(folder: Path, *, vocab: int) -> Path:
    """Student, teacher and prompts under ``folder``; returns it."""
    for name, shape in (("student", STUDENT), ("teacher", TEACHER)):
        arguments: dict[str, Any] = dict(shape)
        tiny_model(folder / name, vocab=vocab, max_positions=512, **arguments)
        _make_endless(folder / name)
        _tokenizer(vocab).save_pretrained(folder / name)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in _prompts(vocab)])
    return folder


def read_prompts(folder: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]


def _prompts(vocab: int) -> list[str]:
    """Random words, no common prefixes."""
    draw = random.Random(0)
    lengths = [draw.randint(*PROMPT_TOKENS) for _ in range(NUM_PROMPTS)]
    return [" ".join(f"t{draw.randrange(1, vocab)}" for _ in range(length)) for length in lengths]


def _tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Token ``i`` is the word ``ti``, so that every sequence of ids can be written as a text. No end of sequence."""
    words = {f"t{i}": i for i in range(vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token=f"t{PAD_ID}", chat_template=CHAT_TEMPLATE
    )


def _make_endless(folder: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"eos_token_id": None, "bos_token_id": None, "pad_token_id": PAD_ID}))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
