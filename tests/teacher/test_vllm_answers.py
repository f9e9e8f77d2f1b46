"""The JSON of a stock vLLM server becomes the same ``Scores`` as the definition gives; what is none is refused."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import MalformedFrame
from teacher.protocol import LOWEST_LOGPROB, ScoreRequest, score_request
from teacher.vllm_answers import Route, has_prompt_logprobs, most_bytes, question, scores_of

VOCAB = 12
GENERATE: Route = "/inference/v1/generate"
COMPLETIONS: Route = "/v1/completions"


def rows_as_vllm_writes_them(logprobs_LV: np.ndarray[Any, Any], ids: list[int], top_k: int) -> list[Any]:
    """Row i is about token i, of which row i − 1 of ``logprobs_LV`` is the distribution: the token, then the top."""
    rows: list[Any] = [None]
    for i in range(1, len(ids)):
        row = logprobs_LV[i - 1]
        top = np.argsort(-row, kind="stable")[:top_k]
        # An id that comes twice keeps its first place, as in a dictionary of Python.
        named = dict.fromkeys([ids[i], *top.tolist()])
        rows.append({str(k): {"logprob": float(row[k]), "rank": 1, "decoded_token": "\ufffd"} for k in named})
    return rows


def body_of(route: Route, rows: Any, **more: Any) -> bytes:
    inner = {"prompt_logprobs": rows, "index": 0}
    outer = {"id": "x", "choices": [inner]} if route == COMPLETIONS else {"request_id": "x", "choices": [{}], **inner}
    return json.dumps(outer | more).encode()


@given(
    seed=st.integers(0, 2**32 - 1),
    num_prompt=st.integers(1, 4),
    num_response=st.integers(1, 5),
    top_k=st.integers(1, VOCAB),
    route=st.sampled_from([GENERATE, COMPLETIONS]),
)
def test_scores_are_those_of_the_definition(
    seed: int, num_prompt: int, num_response: int, top_k: int, route: Route
) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCAB, num_prompt + num_response).tolist()
    logits = rng.normal(size=(len(ids), VOCAB)) * 3
    logits[:, 5] = -np.inf
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    logprobs[:, 5] = -9999.0  # vLLM's −∞
    request = score_request(prompt_ids=ids[:num_prompt], response_ids=ids[num_prompt:], top_k=top_k)
    body = body_of(route, rows_as_vllm_writes_them(logprobs, ids, top_k))

    scores = scores_of(body, request, vocab_size=VOCAB)

    expected = np.where(logprobs == -9999.0, LOWEST_LOGPROB, logprobs)[num_prompt - 1 : -1]
    top = np.argsort(-expected, axis=1, kind="stable")[:, :top_k]
    np.testing.assert_array_equal(scores.top_ids, top)
    np.testing.assert_allclose(scores.top_logprobs, np.take_along_axis(expected, top, 1), rtol=1e-6, atol=1e-7)
    sampled = np.take_along_axis(expected, np.array(ids[num_prompt:])[:, None], 1)[:, 0]
    np.testing.assert_allclose(scores.sampled_logprobs, sampled, rtol=1e-6, atol=1e-7)
    assert [str(a.dtype) for a in (scores.top_ids, scores.top_logprobs, scores.sampled_logprobs)] == [
        "int32",
        "float32",
        "float32",
    ]
    assert len(body) <= most_bytes(request)


def small(**more: Any) -> tuple[ScoreRequest, list[Any]]:
    """Two prompt and two response tokens, top 2."""
    logprobs = np.log(np.full((4, VOCAB), 1 / VOCAB))
    request = score_request(prompt_ids=[1, 2], response_ids=[0, 1], top_k=2, **more)
    return request, rows_as_vllm_writes_them(logprobs, [1, 2, 0, 1], 2)


def test_equal_values_come_in_the_order_of_their_ids() -> None:
    request, rows = small()
    rows[-1] = {key: {"logprob": -2.5} for key in ("1", "9", "4")}

    assert scores_of(body_of(GENERATE, rows), request, vocab_size=VOCAB).top_ids[1].tolist() == [1, 4]


def test_ids_that_the_caller_names_come_as_an_array() -> None:
    request, rows = small(extra_ids=np.array([[3, 4, 5], [6, 7, 8]], np.int32))
    values = np.array([[-1.0, -2.0, -np.inf], [-4.0, -5.0, 1e-6]], np.float32)
    file = io.BytesIO()
    np.save(file, values)
    body = body_of(GENERATE, rows, prompt_token_id_logprobs=base64.b64encode(file.getvalue()).decode())

    extra = scores_of(body, request, vocab_size=VOCAB).extra_logprobs

    assert extra is not None
    np.testing.assert_array_equal(extra, [[-1, -2, LOWEST_LOGPROB], [-4, -5, 0]])
    asked = json.loads(question(GENERATE, request, model="m"))["sampling_params"]
    assert asked["prompt_logprob_start"] == 1
    assert asked["prompt_logprob_token_ids"] == [[3, 4, 5], [6, 7, 8]]


def pickled() -> str:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], object), allow_pickle=True)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("text", [None, "", "%%%", base64.b64encode(b"\x93NUMPY").decode(), pickled()])
def test_named_ids_that_are_no_array_are_refused_and_nothing_is_unpickled(text: str | None) -> None:
    request, rows = small(extra_ids=np.array([[3], [4]], np.int32))

    with pytest.raises(MalformedFrame, match="prompt_token_id_logprobs"):
        scores_of(body_of(GENERATE, rows, prompt_token_id_logprobs=text), request, vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (None, "row 1 of the response is no list"),
        ([], "row 1 of the response is no list"),
        ({}, "has 0 ids, expected 2 or 3"),
        ({"1": {"logprob": -2}}, "has 1 ids"),
        ({str(i): {"logprob": -2.5} for i in range(4)}, "has 4 ids"),
        ({"x": {"logprob": -2}, "1": {"logprob": -2}}, "no list of log-probabilities"),
        ({"99999999999": {"logprob": -2}, "1": {"logprob": -2}}, "no list of log-probabilities"),
        ({"1": {"logprob": "-2"}, "2": {"logprob": -2}}, "no list of log-probabilities"),
        ({"1": {}, "2": {}}, "no list of log-probabilities"),
        ({"3": {"logprob": -2}, "2": {"logprob": -2}}, "response token 1 is 1, of which its row says nothing"),
        ({"1": {"logprob": -2}, "12": {"logprob": -2}}, "an id is 12, the vocabulary ends at 11"),
        ({"1": {"logprob": 3.5}, "2": {"logprob": 9.25}}, "largest value is 9.25"),
        ({"1": {"logprob": -0.1}, "2": {"logprob": -0.1}}, "a probability of 1.8"),
    ],
)
def test_a_row_that_says_something_else_is_refused_with_its_number(row: Any, match: str) -> None:
    request, rows = small()

    with pytest.raises(MalformedFrame, match=match):
        scores_of(body_of(GENERATE, [*rows[:-1], row]), request, vocab_size=VOCAB)


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"[]", b"{", b'{"prompt_logprobs": 3}', b'{"choices": [3]}', b"\xff", b"{}", b'{"choices": []}'],
)
def test_what_is_no_answer_is_refused(body: bytes) -> None:
    request, _ = small()

    assert not has_prompt_logprobs(body)
    with pytest.raises(MalformedFrame):
        scores_of(body, request, vocab_size=VOCAB)


def test_an_answer_to_another_question_is_refused() -> None:
    request, rows = small()

    with pytest.raises(MalformedFrame, match="4 tokens were sent and prompt_logprobs has 5 rows"):
        scores_of(body_of(COMPLETIONS, [*rows, rows[-1]]), request, vocab_size=VOCAB)
