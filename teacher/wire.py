"""Bytes of a score request and its answer. Strict both ways: what is not exactly a frame is ``MalformedFrame``.

    offset  bytes  content
    0       4      magic "TWF1"
    4       2      protocol version, unsigned
    6       1      kind: 1 request, 2 answer
    7       1      0
    8       4      H, length of the header, unsigned
    12      H      header, a msgpack map (RequestHeader or AnswerHeader)
    12+H    …      the arrays that the header announces, one after the other, without padding

Everything is little-endian. Token ids are unsigned and take 2, 3 or 4 bytes, as the header says. Nothing is unpickled,
no length is believed before it has been compared with the bytes that are there. docs/protocol.md says it in words.

    P prompt tokens     T response tokens     K top_k     E ids per position that the caller named
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from engine.errors import MalformedFrame
from teacher.protocol import LOWEST_LOGPROB, MAX_REQUEST_ID_CHARS, PROTOCOL, ScoreRequest, Scores, Values

MAX_HEADER_BYTES = 1024

CONTENT_TYPE = "application/x-teacher-frame"

IdBytes = Literal[2, 3, 4]
_Count = Annotated[int, Meta(ge=0, lt=2**31)]
_AtLeastOne = Annotated[int, Meta(ge=1, lt=2**31)]

_MAGIC = b"TWF1"
_REQUEST, _ANSWER = 1, 2
_PREFIX = struct.Struct("<4sHBBI")
_FLOATS: dict[Values, np.dtype[np.floating]] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}


class RequestHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Arrays: prompt ids [P], response ids [T], extra ids [T, E], all of ``id_bytes`` bytes per id."""

    num_prompt: _AtLeastOne
    num_response: _AtLeastOne
    top_k: _AtLeastOne
    num_extra: _Count | None = None
    """E; absent or null: no extra ids are asked for."""
    alone: bool = False
    request_id: Annotated[str, Meta(min_length=1, max_length=MAX_REQUEST_ID_CHARS)] | None = None
    values: Values
    """How the answer's log-probabilities are to be packed."""
    id_bytes: IdBytes


class AnswerHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Arrays: top ids [T, K] of ``id_bytes``; then ``values``: top [T, K], sampled [T], extra [T, E]."""

    num_response: _AtLeastOne
    top_k: _AtLeastOne
    num_extra: _Count | None = None
    values: Values
    id_bytes: IdBytes


class ErrorAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """JSON body of every HTTP answer that is not 2xx."""

    error: str
    """What is so, what was expected, what to do."""
    retry_after_s: float | None = None
    """With status 429; the header of that name is the same in whole seconds."""


_encoder = msgspec.msgpack.Encoder()
_request_header = msgspec.msgpack.Decoder(RequestHeader)
_answer_header = msgspec.msgpack.Decoder(AnswerHeader)
_HeaderT = TypeVar("_HeaderT")


def id_bytes_for(vocab_size: int) -> IdBytes:
    """The fewest bytes that hold every id below ``vocab_size``."""
    if vocab_size <= 1 << 16:
        return 2
    return 3 if vocab_size <= 1 << 24 else 4


def encode_request(request: ScoreRequest, *, values: Values) -> bytes:
    """One frame; ids take as many bytes as the largest of them needs."""
    arrays = [request.prompt_ids, request.response_ids]
    if request.extra_ids is not None:
        arrays.append(request.extra_ids)
    id_bytes = id_bytes_for(1 + max(int(array.max()) for array in arrays if array.size))
    header = RequestHeader(
        num_prompt=len(request.prompt_ids),
        num_response=len(request.response_ids),
        top_k=request.top_k,
        num_extra=None if request.extra_ids is None else int(request.extra_ids.shape[1]),
        alone=request.alone,
        request_id=request.request_id,
        values=values,
        id_bytes=id_bytes,
    )
    return _frame(_REQUEST, header, [_pack_ids(array, id_bytes) for array in arrays])


def decode_request(frame: bytes) -> tuple[ScoreRequest, Values]:
    """Read a request and the packing that its answer is to have.

    Raises:
        MalformedFrame: anything but one whole request frame of this protocol version.
    """
    header, body = _open(frame, _REQUEST, _request_header)
    num_extra = header.num_extra or 0
    sizes = [header.num_prompt, header.num_response, header.num_response * num_extra]
    prompt, response, extra = _split(body, [size * header.id_bytes for size in sizes])
    request = ScoreRequest(
        prompt_ids=_unpack_ids(prompt, header.id_bytes),
        response_ids=_unpack_ids(response, header.id_bytes),
        top_k=header.top_k,
        extra_ids=(
            None
            if header.num_extra is None
            else _unpack_ids(extra, header.id_bytes).reshape(header.num_response, num_extra)
        ),
        alone=header.alone,
        request_id=header.request_id,
    )
    return request, header.values


def encode_answer(scores: Scores, *, values: Values, vocab_size: int) -> bytes:
    """One frame.

    Raises:
        ValueError: a log-probability is NaN.
    """
    id_bytes = id_bytes_for(vocab_size)
    arrays = [scores.top_logprobs, scores.sampled_logprobs]
    if scores.extra_logprobs is not None:
        arrays.append(scores.extra_logprobs)
    num_response, top_k = scores.top_ids.shape
    header = AnswerHeader(
        num_response=num_response,
        top_k=top_k,
        num_extra=None if scores.extra_logprobs is None else int(scores.extra_logprobs.shape[1]),
        values=values,
        id_bytes=id_bytes,
    )
    return _frame(_ANSWER, header, [_pack_ids(scores.top_ids, id_bytes), *(_pack_values(a, values) for a in arrays)])


def decode_answer(frame: bytes) -> Scores:
    """Read an answer; log-probabilities come back as float32.

    Raises:
        MalformedFrame: anything but one whole answer frame of this protocol version, or a log-probability that is not
            finite.
    """
    header, body = _open(frame, _ANSWER, _answer_header)
    num_response, top_k, num_extra = header.num_response, header.top_k, header.num_extra or 0
    size = _FLOATS[header.values].itemsize
    per_token = (top_k * header.id_bytes, top_k * size, size, num_extra * size)
    top_ids, top, sampled, extra = _split(body, [num_response * num_bytes for num_bytes in per_token])
    return Scores(
        top_ids=_unpack_ids(top_ids, header.id_bytes).reshape(num_response, top_k),
        top_logprobs=_unpack_values(top, header.values).reshape(num_response, top_k),
        sampled_logprobs=_unpack_values(sampled, header.values),
        extra_logprobs=(
            None if header.num_extra is None else _unpack_values(extra, header.values).reshape(num_response, num_extra)
        ),
    )


def answer_bytes(request: ScoreRequest, *, values: Values) -> int:
    """The most bytes that an answer to this request can have: what a client agrees to read."""
    num_extra = 0 if request.extra_ids is None else int(request.extra_ids.shape[1])
    per_token = request.top_k * (4 + _FLOATS[values].itemsize) + (1 + num_extra) * _FLOATS[values].itemsize
    return _PREFIX.size + MAX_HEADER_BYTES + len(request.response_ids) * per_token


def _frame(kind: int, header: msgspec.Struct, arrays: Sequence[bytes]) -> bytes:
    head = _encoder.encode(header)
    return b"".join((_PREFIX.pack(_MAGIC, PROTOCOL, kind, 0, len(head)), head, *arrays))


def _open(frame: bytes, kind: int, decoder: msgspec.msgpack.Decoder[_HeaderT]) -> tuple[_HeaderT, memoryview]:
    if len(frame) < _PREFIX.size:
        raise MalformedFrame(f"{len(frame)} bytes are too few for a frame, which begins with {_PREFIX.size}")
    magic, protocol, got_kind, reserved, length = _PREFIX.unpack_from(frame)
    if magic != _MAGIC:
        raise MalformedFrame(f"a frame begins with {_MAGIC!r}, this one with {magic!r}")
    if protocol != PROTOCOL:
        raise MalformedFrame(f"protocol {protocol} of the frame is not {PROTOCOL}, ours; upgrade the older side")
    if got_kind != kind or reserved != 0:
        raise MalformedFrame(f"expected a frame of kind {kind}, got kind {got_kind} with reserved byte {reserved}")
    if length > min(MAX_HEADER_BYTES, len(frame) - _PREFIX.size):
        raise MalformedFrame(
            f"the header claims {length} bytes, of which {len(frame) - _PREFIX.size} are there and "
            f"{MAX_HEADER_BYTES} are allowed"
        )
    view = memoryview(frame)[_PREFIX.size :]
    try:
        return decoder.decode(view[:length]), view[length:]
    # msgspec gives up on deep nesting with RecursionError and on bad UTF-8 with a plain UnicodeDecodeError.
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedFrame(f"the header of the frame is wrong: {error}") from None


def _split(body: memoryview, sizes: Sequence[int]) -> list[memoryview]:
    if len(body) != sum(sizes):
        raise MalformedFrame(f"the header announces {sum(sizes)} bytes of arrays, there are {len(body)}")
    parts = []
    for size in sizes:
        parts.append(body[:size])
        body = body[size:]
    return parts


def _pack_ids(ids: npt.NDArray[np.int32], id_bytes: IdBytes) -> bytes:
    if id_bytes == 2:
        return ids.astype("<u2").tobytes()
    if id_bytes == 4:
        return ids.astype("<u4").tobytes()
    return ids.astype("<u4").reshape(-1, 1).view(np.uint8)[:, :3].tobytes()


def _unpack_ids(raw: memoryview, id_bytes: IdBytes) -> npt.NDArray[np.int32]:
    if id_bytes == 2:
        return np.frombuffer(raw, "<u2").astype(np.int32)
    if id_bytes == 3:
        wide = np.zeros((len(raw) // 3, 4), np.uint8)
        wide[:, :3] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        return wide.view("<u4")[:, 0].astype(np.int32)
    ids = np.frombuffer(raw, "<u4")
    if ids.size and int(ids.max()) >= 2**31:
        raise MalformedFrame(f"token id {int(ids.max())} does not fit into 31 bits")
    return ids.astype(np.int32)


def _pack_values(logprobs: npt.NDArray[np.float32], values: Values) -> bytes:
    if np.isnan(logprobs).any():
        raise ValueError("a log-probability is NaN; the model's output is broken")
    return np.clip(logprobs, LOWEST_LOGPROB, 0.0).astype(_FLOATS[values]).tobytes()


def _unpack_values(raw: memoryview, values: Values) -> npt.NDArray[np.float32]:
    array = np.frombuffer(raw, _FLOATS[values]).astype(np.float32)
    if not np.isfinite(array).all():
        raise MalformedFrame("a log-probability is not finite")
    return array
