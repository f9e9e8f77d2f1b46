"""One answer of a step, told token by token."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from engine.actors.trained_answer import MAX_TOKENS, describe, pieces
from engine.training.protocol import TokenLosses
from engine.types import Prompt, Rollout, ScoredRollout, VersionSpan
from teacher.protocol import Scores
from tests.support.models import EOS_ID, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def scored(response_ids: Sequence[int], *, prompt_ids: Sequence[int] = (5, 6)) -> ScoredRollout[Scores]:
    size = len(response_ids)
    return ScoredRollout(
        rollout=Rollout(
            prompt=Prompt(rollout_id=7, epoch=0, prompt_index=0, sample_index=0, token_ids=tuple(prompt_ids)),
            response_ids=tuple(response_ids),
            logprobs=(-1.0,) * size,
            sampling_logprobs=(-1.0,) * size,
            spans=(VersionSpan(version=3, start=0, end=1), VersionSpan(version=4, start=1, end=size)),
            finish_reason="stop",
        ),
        scores=Scores(
            top_ids=np.zeros((size, 2), np.int32),
            top_logprobs=np.zeros((size, 2), np.float32),
            sampled_logprobs=np.linspace(-1, 0, size, dtype=np.float32),
        ),
    )


def losses(size: int) -> TokenLosses:
    return TokenLosses(index=0, divergences=(0.123456,) * size, logprobs=(-2.0,) * size)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(text=st.text(max_size=60))
def test_the_pieces_together_are_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = list(pieces(lambda ids: str(tokenizer.decode(list(ids))), ids))

    assert len(found) == len(ids)
    assert "".join(found) == tokenizer.decode(ids)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(ids=st.lists(st.integers(0, 383), max_size=60))
def test_whatever_a_model_says_every_token_gets_a_piece(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> None:
    longest = 0

    def decode(some: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(some))
        return str(tokenizer.decode(list(some)))

    assert len(list(pieces(decode, ids))) == len(ids)
    assert longest <= 17, "the work for one token does not grow with the answer"


def test_a_character_of_several_tokens_is_said_by_its_last(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode("a\N{GRINNING FACE}b", add_special_tokens=False)
    found = list(pieces(lambda ids: str(tokenizer.decode(list(ids))), ids))

    assert found == ["a", "", "", "", "\N{GRINNING FACE}", "b"]


def test_spaces_at_the_beginning_of_words_stay() -> None:
    """As SentencePiece tokenizers do: the space of the first word is dropped, all others belong to their words."""
    words = {1: " the", 2: " river", 3: "s"}

    def decode(ids: Sequence[int]) -> str:
        return "".join(words[i] for i in ids).removeprefix(" ")

    assert list(pieces(decode, [1, 2, 3, 1])) == ["the", " river", "s", " the"]


def test_an_answer_is_told_with_its_stop_token_and_the_prompt_without_those_of_the_template(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}], add_generation_prompt=True, tokenize=False
    )
    ids = (*tokenizer.encode(" So.", add_special_tokens=False), EOS_ID)
    told = describe(
        scored(ids, prompt_ids=tokenizer.encode(str(prompt), add_special_tokens=False)),
        losses(len(ids)),
        step=5,
        age=1,
        decode=lambda ids, without: str(tokenizer.decode(list(ids), skip_special_tokens=without)),
    )

    assert told["prompt"] == "user\nWhy?\nassistant"
    assert "".join(told["pieces"]) == " So.<|eos|>"  # type: ignore[arg-type]
    assert (told["step"], told["rollout_id"], told["age"], told["num_tokens"]) == (5, 7, 1, len(ids))
    assert told["versions"] == [(3, 0, 1), (4, 1, len(ids))]
    assert told["divergences"] == [0.1235] * len(ids)
    assert told["student_logprobs"] == [-2.0] * len(ids)
    assert told["teacher_logprobs"][0] == -1.0  # type: ignore[index]


def test_of_a_long_answer_the_beginning_is_told() -> None:
    told = describe(
        scored([9] * 9000),
        TokenLosses(index=0, divergences=(math.nan,) * 9000, logprobs=(-1.0,) * 9000),
        step=1,
        age=0,
        decode=lambda ids, _: "ab" * len(ids),
    )

    assert told["num_tokens"] == 9000
    for name in ("pieces", "divergences", "student_logprobs", "teacher_logprobs"):
        assert len(told[name]) == MAX_TOKENS  # type: ignore[arg-type]
    assert len(json.dumps(told)) < 40_000
