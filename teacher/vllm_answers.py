"""What a stock vLLM server is sent and what its JSON means. Values in, values out: asks nobody, waits for nothing.

    P prompt tokens     T response tokens     K top_k     E ids per position that the caller named

A server is asked to continue prompt and response by one token and to say what it thinks of both on the way. Its list
has an entry per token, null for the first: an object from token id to ``{"logprob": …}``, the token itself first, then
the K most likely, of which the token may be one. Only the last T are read.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from engine.errors import MalformedFrame
from teacher.protocol import LOWEST_LOGPROB, ScoreRequest, Scores

Route = Literal["/inference/v1/generate", "/v1/completions"]
"""The first takes ids and gives ids; the second writes the text of every token beside its number."""

_INFINITY = -9999.0
"""What vLLM writes for −∞, which JSON has no word for."""

_ROUNDING = 1e-3
"""By so much log-probabilities may exceed 0, and the probabilities of a row 1."""

_BYTES_PER_ENTRY = 256
"""Room for ``"49151":{"logprob":-13.123456954956055,"rank":49151,"decoded_token":"…"},``; half of it is used."""


class _Entry(msgspec.Struct, gc=False):
    logprob: float


class _Choice(msgspec.Struct):
    prompt_logprobs: list[msgspec.Raw] | None = None


class _Answer(msgspec.Struct):
    """Of either route."""

    prompt_logprobs: list[msgspec.Raw] | None = None
    prompt_token_id_logprobs: str | None = None
    choices: list[_Choice] = []


# The list is taken apart without reading what is in it (1 ms per MB), and then entry by entry: a decoder keeps the
# interpreter to itself for as long as one call takes, and the event loop must have its turn in between.
_answer = msgspec.json.Decoder(_Answer)
_entries = msgspec.json.Decoder(dict[int, _Entry])


def question(route: Route, request: ScoreRequest, *, model: str) -> bytes:
    """The body that asks for ``request``."""
    ids = [*request.prompt_ids.tolist(), *request.response_ids.tolist()]
    # Without a temperature, some servers draw as the model's folder says; none of it changes what is asked for.
    params: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": request.top_k}
    if route == "/v1/completions":
        return msgspec.json.encode({"model": model, "prompt": ids, **params})
    params["detokenize"] = False
    if request.extra_ids is not None:
        # Row i is about the token after position start + i.
        params["prompt_logprob_start"] = len(request.prompt_ids) - 1
        params["prompt_logprob_token_ids"] = request.extra_ids.tolist()
    return msgspec.json.encode({"model": model, "token_ids": ids, "sampling_params": params})


def most_bytes(request: ScoreRequest) -> int:
    """What a client agrees to read."""
    num_extra = 0 if request.extra_ids is None else int(request.extra_ids.shape[1])
    per_token = (request.top_k + 1) * _BYTES_PER_ENTRY + num_extra * 8
    return (1 << 16) + request.num_tokens * per_token


def has_prompt_logprobs(body: bytes) -> bool:
    """Whether an answer says anything of its prompt: other servers leave out what they do not know."""
    try:
        return _rows(_answer.decode(body)) is not None
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False


def scores_of(body: bytes, request: ScoreRequest, *, vocab_size: int) -> Scores:
    """Read an answer.

    Equal values are put in the order of their ids; which of several that equal the K-th are in was the server's choice.

    Raises:
        MalformedFrame: not such an answer, or not to this request, or values that are no log-probabilities.
    """
    try:
        answer = _answer.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise MalformedFrame(f"not the JSON of a vLLM server: {error}") from None
    rows = _rows(answer)
    if rows is None or len(rows) != request.num_tokens:
        raise MalformedFrame(
            f"{request.num_tokens} tokens were sent and prompt_logprobs has {'no' if rows is None else len(rows)} rows"
        )
    ids, logprobs = _arrays(rows[len(request.prompt_ids) :], width=request.top_k + 1)
    _check(ids, logprobs, vocab_size=vocab_size)
    is_sampled = ids == request.response_ids[:, None]
    if not is_sampled.any(axis=1).all():
        t = int(np.flatnonzero(~is_sampled.any(axis=1))[0])
        raise MalformedFrame(f"response token {t} is {request.response_ids[t]}, of which its row says nothing")
    top_ids, top_logprobs = _top(ids, logprobs, request.top_k)
    return Scores(
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        # A row names an id once: the sum is that one value.
        sampled_logprobs=np.where(is_sampled, logprobs, np.float32(0)).sum(axis=1, dtype=np.float32),
        extra_logprobs=None if request.extra_ids is None else _extra(answer, request.extra_ids.shape),
    )


def _rows(answer: _Answer) -> list[msgspec.Raw] | None:
    if answer.choices and answer.choices[0].prompt_logprobs is not None:
        return answer.choices[0].prompt_logprobs
    return answer.prompt_logprobs


def _arrays(rows: Sequence[msgspec.Raw], *, width: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Ids and values [T, width]; places that a row does not fill hold id −1 and −∞."""
    ids = np.full((len(rows), width), -1, np.int32)
    logprobs = np.full((len(rows), width), -np.inf, np.float32)
    for t, row in enumerate(rows):
        try:
            entries = _entries.decode(row)
            num = len(entries)
            if not width - 1 <= num <= width:
                raise MalformedFrame(f"row {t} of the response has {num} ids, expected {width - 1} or {width}")
            ids[t, :num] = list(entries)
            logprobs[t, :num] = [entry.logprob for entry in entries.values()]
        except (msgspec.MsgspecError, UnicodeDecodeError, OverflowError) as error:
            raise MalformedFrame(f"row {t} of the response is no list of log-probabilities: {error}") from None
    np.putmask(logprobs, (ids >= 0) & (logprobs <= _INFINITY), np.float32(LOWEST_LOGPROB))
    return ids, logprobs


def _check(ids: npt.NDArray[np.int32], logprobs: npt.NDArray[np.float32], *, vocab_size: int) -> None:
    if int(ids.max()) >= vocab_size or int(ids.min()) < -1:
        raise MalformedFrame(f"an id is {int(ids.max())}, the vocabulary ends at {vocab_size - 1}")
    masses = np.exp(logprobs.astype(np.float64)).sum(axis=1)
    if not (logprobs.max() <= _ROUNDING and masses.max() <= 1 + _ROUNDING):
        raise MalformedFrame(
            f"the largest value is {logprobs.max():g} and the ids of a row have a probability of {masses.max():g} "
            "together: these are no log-probabilities; is the server started with another --logprobs-mode?"
        )
    np.minimum(logprobs, 0, out=logprobs)


def _top(
    ids: npt.NDArray[np.int32], logprobs: npt.NDArray[np.float32], top_k: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """The K largest of each row; a row without K values holds one that is not there, which ``_arrays`` has refused."""
    order = np.argsort(ids, axis=1)
    ids, logprobs = np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)
    order = np.argsort(-logprobs, axis=1, kind="stable")[:, :top_k]
    return np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)


def _extra(answer: _Answer, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """What vLLM calls ``prompt_token_id_logprobs``: the base64 of a .npy file."""
    try:
        data = base64.b64decode(answer.prompt_token_id_logprobs or "", validate=True)
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (binascii.Error, ValueError, EOFError, OSError) as error:
        raise MalformedFrame(f"prompt_token_id_logprobs is no array: {error}") from None
    if array.shape != shape or array.dtype.kind != "f" or np.isnan(array).any():
        raise MalformedFrame(
            f"prompt_token_id_logprobs has shape {list(array.shape)} of {array.dtype}, expected {list(shape)} numbers"
        )
    logprobs: npt.NDArray[np.float32] = array.astype(np.float32).clip(LOWEST_LOGPROB, 0)
    return logprobs
