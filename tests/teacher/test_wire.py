"""Frames: what goes in comes out, within the stated precision and size; what is not a frame is refused."""

from __future__ import annotations

import struct

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.errors import MalformedFrame, TeacherRefused
from teacher import wire
from teacher.protocol import LOWEST_LOGPROB, ScoreRequest, Scores, TeacherInfo, Values, check_fits, score_request

VALUES = st.sampled_from(["float16", "float32"])


def make_request(
    *, num_prompt: int = 3, num_response: int = 2, top_k: int = 4, num_extra: int | None = None, largest: int = 99
) -> ScoreRequest:
    ids = np.arange(num_prompt + num_response, dtype=np.int32)
    ids[0] = largest
    return score_request(
        prompt_ids=ids[:num_prompt].tolist(),
        response_ids=ids[num_prompt:].tolist(),
        top_k=top_k,
        extra_ids=None if num_extra is None else np.full((num_response, num_extra), largest, np.int32),
        alone=True,
        request_id="run-7/12",
    )


def make_scores(
    *, num_response: int = 5, top_k: int = 4, num_extra: int | None = None, vocab_size: int = 100
) -> Scores:
    rng = np.random.default_rng(0)
    logprobs = -rng.exponential(5.0, (num_response, top_k)).astype(np.float32)
    return Scores(
        top_ids=rng.integers(0, vocab_size, (num_response, top_k), np.int32),
        top_logprobs=-np.sort(-logprobs, axis=1),
        sampled_logprobs=logprobs[:, 0],
        extra_logprobs=None
        if num_extra is None
        else -rng.exponential(5.0, (num_response, num_extra)).astype(np.float32),
    )


def frame(header: bytes, body: bytes = b"", *, magic: bytes = b"TWF1", protocol: int = 1, kind: int = 1) -> bytes:
    return struct.pack("<4sHBBI", magic, protocol, kind, 0, len(header)) + header + body


def header(**changes: object) -> bytes:
    fields = {"num_prompt": 1, "num_response": 1, "top_k": 1, "values": "float16", "id_bytes": 2} | changes
    return msgspec.msgpack.encode(fields)


@given(
    num_prompt=st.integers(1, 9),
    num_response=st.integers(1, 9),
    num_extra=st.none() | st.integers(0, 3),
    largest=st.sampled_from([8, 65_535, 65_536, 2**24 - 1, 2**24, 2**31 - 1]),
    values=VALUES,
)
def test_a_request_comes_back_as_it_went(
    num_prompt: int, num_response: int, num_extra: int | None, largest: int, values: Values
) -> None:
    request = make_request(num_prompt=num_prompt, num_response=num_response, num_extra=num_extra, largest=largest)

    decoded, wanted = wire.decode_request(wire.encode_request(request, values=values))

    assert wanted == values
    assert decoded.identity() == request.identity()
    assert (decoded.alone, decoded.request_id, decoded.top_k) == (True, "run-7/12", 4)
    np.testing.assert_array_equal(decoded.response_ids, request.response_ids)
    if num_extra is None:
        assert decoded.extra_ids is None
    else:
        np.testing.assert_array_equal(decoded.extra_ids, request.extra_ids)


@given(
    num_response=st.integers(1, 9),
    top_k=st.integers(1, 9),
    num_extra=st.none() | st.integers(0, 3),
    vocab_size=st.sampled_from([100, 65_536, 65_537, 2**24, 2**24 + 1]),
)
def test_a_float32_answer_comes_back_bit_for_bit(
    num_response: int, top_k: int, num_extra: int | None, vocab_size: int
) -> None:
    scores = make_scores(num_response=num_response, top_k=top_k, num_extra=num_extra, vocab_size=vocab_size)

    decoded = wire.decode_answer(wire.encode_answer(scores, values="float32", vocab_size=vocab_size))

    np.testing.assert_array_equal(decoded.top_ids, scores.top_ids)
    np.testing.assert_array_equal(decoded.top_logprobs, scores.top_logprobs)
    np.testing.assert_array_equal(decoded.sampled_logprobs, scores.sampled_logprobs)
    if num_extra is None:
        assert decoded.extra_logprobs is None
    else:
        np.testing.assert_array_equal(decoded.extra_logprobs, scores.extra_logprobs)


@given(st.lists(st.floats(-65504, 0, width=32), min_size=1, max_size=50))
def test_float16_is_off_by_at_most_two_to_the_minus_eleven_of_the_value(logprobs: list[float]) -> None:
    exact = np.array(logprobs, np.float32)
    scores = Scores(top_ids=np.zeros((len(exact), 1), np.int32), top_logprobs=exact[:, None], sampled_logprobs=exact)

    decoded = wire.decode_answer(wire.encode_answer(scores, values="float16", vocab_size=10))

    # Below 2^-14 float16 is subnormal and its steps are 2^-24 wide.
    bound = np.maximum(np.abs(exact.astype(np.float64)) * 2.0**-11, 2.0**-25)
    assert (np.abs(decoded.sampled_logprobs.astype(np.float64) - exact) <= bound).all()


@pytest.mark.parametrize("values", ["float16", "float32"])
def test_minus_infinity_is_sent_as_the_lowest_number_and_positive_rounding_as_zero(values: Values) -> None:
    logprobs = np.array([-np.inf, -1e30, -70_000.0, 1e-7], np.float32)
    scores = Scores(top_ids=np.zeros((4, 1), np.int32), top_logprobs=logprobs[:, None], sampled_logprobs=logprobs)

    decoded = wire.decode_answer(wire.encode_answer(scores, values=values, vocab_size=10))

    assert decoded.sampled_logprobs.tolist() == [LOWEST_LOGPROB] * 3 + [0.0]


def test_nan_is_never_sent() -> None:
    scores = make_scores()
    scores.top_logprobs[0, 0] = np.nan

    with pytest.raises(ValueError, match="NaN"):
        wire.encode_answer(scores, values="float16", vocab_size=100)


@pytest.mark.parametrize("vocab_size", [49_152, 151_936, 256_000])
@pytest.mark.parametrize(("num_response", "top_k"), [(48, 64), (2048, 64), (512, 256)])
def test_the_default_packing_takes_at_most_65_percent_of_float32_and_int32(
    vocab_size: int, num_response: int, top_k: int
) -> None:
    scores = make_scores(num_response=num_response, top_k=top_k, vocab_size=vocab_size)

    packed = len(wire.encode_answer(scores, values="float16", vocab_size=vocab_size))

    plain = scores.top_ids.nbytes + scores.top_logprobs.nbytes + scores.sampled_logprobs.nbytes
    assert packed <= 0.65 * plain
    if vocab_size <= 65_536:
        assert packed <= 0.52 * plain


@given(num_extra=st.none() | st.integers(0, 3), values=VALUES, vocab_size=st.sampled_from([9, 2**20, 2**30]))
def test_a_client_agrees_to_read_as_many_bytes_as_an_answer_can_have(
    num_extra: int | None, values: Values, vocab_size: int
) -> None:
    request = make_request(num_response=5, top_k=4, num_extra=num_extra)
    answer = wire.encode_answer(make_scores(num_extra=num_extra), values=values, vocab_size=vocab_size)

    assert len(answer) <= wire.answer_bytes(request, values=values)


GOLDEN_REQUEST = bytes.fromhex(
    "54574631 0100 01 00 59000000"
    "88 aa6e756d5f70726f6d7074 02 ac6e756d5f726573706f6e7365 01 a5746f705f6b 02 a96e756d5f6578747261 c0"
    "a5616c6f6e65 c2 aa726571756573745f6964 c0 a676616c756573 a7666c6f61743136 a869645f6279746573 02"
    "0500 0700 0900"
)
"""The example of docs/protocol.md."""


def test_the_bytes_of_a_request_are_those_of_the_document() -> None:
    request = score_request(prompt_ids=[5, 7], response_ids=[9], top_k=2)

    assert wire.encode_request(request, values="float16") == GOLDEN_REQUEST


@given(st.binary(max_size=200))
@example(b"")
@example(b"TWF1")
@example(frame(b"\x81" * 900))
@example(frame(b"\x91" * 1024))
@example(frame(b"\xdf\xff\xff\xff\xff"))
@example(frame(b"\xdd\xff\xff\xff\xff"))
@example(frame(b"\x85\xa1\xff"))
def test_random_bytes_are_malformed_and_nothing_worse(data: bytes) -> None:
    with_header = frame(header(), data + b"x" * (len(data) == 4))  # four bytes would be right

    for body in (data, frame(data), with_header):
        with pytest.raises(MalformedFrame):
            wire.decode_request(body)
        with pytest.raises(MalformedFrame):
            wire.decode_answer(body)


@given(st.data())
def test_a_frame_with_one_changed_bit_is_read_or_malformed(data: st.DataObject) -> None:
    whole = wire.encode_answer(make_scores(num_extra=2), values="float16", vocab_size=100)
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    changed = bytearray(whole)
    changed[bit // 8] ^= 1 << bit % 8

    try:
        scores = wire.decode_answer(bytes(changed))
    except MalformedFrame:
        return
    assert np.isfinite(scores.top_logprobs).all()


@given(st.integers(0, 10_000))
def test_a_torn_or_longer_frame_is_malformed(cut: int) -> None:
    whole = wire.encode_request(make_request(num_extra=2), values="float16")

    with pytest.raises(MalformedFrame):
        wire.decode_request(whole[: cut % len(whole)])
    with pytest.raises(MalformedFrame):
        wire.decode_request(whole + b"\0" * (1 + cut % 5))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (frame(header(), b"\0" * 4, magic=b"HTTP"), r"begins with b'TWF1', this one with b'HTTP'"),
        (frame(header(), b"\0" * 4, protocol=2), r"protocol 2 of the frame is not 1, ours; upgrade the older side"),
        (frame(header(), b"\0" * 4, kind=2), r"expected a frame of kind 1, got kind 2"),
        (frame(header(), b"\0" * 3), r"announces 4 bytes of arrays, there are 3"),
        (frame(header(num_response=2**31 - 1, num_extra=2**31 - 1), b"\0" * 4), r"announces \d{19} bytes of arrays"),
        (frame(header(num_prompt=2**40)), r"`int` <= 2147483647"),
        (frame(header(num_prompt=0)), r"`int` >= 1 - at `\$.num_prompt`"),
        (frame(header(num_extra=-1)), r"`int` >= 0 - at `\$.num_extra`"),
        (frame(header(values="float8")), r"Invalid enum value 'float8' - at `\$.values`"),
        (frame(header(id_bytes=8)), r"Invalid enum value 8 - at `\$.id_bytes`"),
        (frame(header(surprise=1)), r"unknown field `surprise`"),
        (frame(header(request_id="x" * 129)), r"length <= 128"),
        (struct.pack("<4sHBBI", b"TWF1", 1, 1, 0, 2**32 - 1), r"claims 4294967295 bytes, of which 0 are there"),
        (frame(b"\xc0" * 1025), r"1024 are allowed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_malformed_request_is_refused_with_its_reason(data: bytes, message: str) -> None:
    with pytest.raises(MalformedFrame, match=message):
        wire.decode_request(data)


def test_an_id_that_needs_the_sign_bit_is_malformed() -> None:
    body = struct.pack("<II", 2**31, 1)

    with pytest.raises(MalformedFrame, match="token id 2147483648"):
        wire.decode_request(frame(header(id_bytes=4), body))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_answer_that_is_not_finite_is_malformed(value: float) -> None:
    whole = wire.encode_answer(make_scores(), values="float32", vocab_size=100)

    with pytest.raises(MalformedFrame, match="not finite"):
        wire.decode_answer(whole[:-4] + np.array([value], "<f4").tobytes())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": []}, r"^prompt_ids has shape \[0\], expected at least one id"),
        ({"response_ids": []}, r"^response_ids has shape \[0\]"),
        ({"prompt_ids": [[1]]}, r"^prompt_ids has shape \[1, 1\]"),
        ({"prompt_ids": [-1]}, r"^prompt_ids must be whole numbers from 0"),
        ({"prompt_ids": [2**31]}, r"^prompt_ids must be whole numbers"),
        ({"response_ids": [0.5]}, r"^response_ids must be whole numbers"),
        ({"top_k": 0}, r"^top_k=0, expected at least 1"),
        ({"top_k": np.int64(0)}, r"^top_k=0, expected at least 1"),
        ({"top_k": "3"}, r"^top_k='3', expected a whole number"),
        ({"top_k": 3.0}, r"^top_k=3\.0, expected a whole number"),
        ({"extra_ids": np.zeros((3, 1), np.int32)}, r"^extra_ids has shape \[3, 1\], expected \[2, E\]"),
        ({"request_id": ""}, r"^request_id has 0 characters"),
        ({"request_id": "x" * 129}, r"^request_id has 129 characters, expected 1 to 128"),
    ],
)
def test_arguments_that_no_teacher_answers_are_refused(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"prompt_ids": [1], "response_ids": [2, 3], "top_k": 1} | changes

    with pytest.raises(TeacherRefused, match=message) as caught:
        score_request(**arguments)  # type: ignore[arg-type]
    assert caught.value.status == 422


def test_a_top_k_of_numpy_travels_like_any_other() -> None:
    of_numpy: int = np.int64(3)  # type: ignore[assignment]
    request = score_request(prompt_ids=[1], response_ids=[2, 3], top_k=of_numpy)

    decoded, _ = wire.decode_request(wire.encode_request(request, values="float16"))

    assert decoded.top_k == 3


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (make_request(num_prompt=9), r"9 prompt and 2 response tokens are 11 together, this teacher takes at most 10"),
        (make_request(top_k=21), r"top_k=21, this teacher gives at most 20"),
        (make_request(num_extra=21), r"extra ids per token=21, this teacher gives at most 20"),
        (make_request(largest=100), r"prompt_ids has id 100, this teacher's vocabulary ends at 99"),
        (make_request(), None),
    ],
)
def test_a_request_that_does_not_fit_the_teacher_is_refused(request_: ScoreRequest, message: str | None) -> None:
    info = TeacherInfo(
        model="tiny",
        vocab_size=100,
        tokenizer_size=100,
        tokenizer_fingerprint="",
        max_length=10,
        max_top_k=20,
        protocol=1,
    )

    if message is None:
        check_fits(request_, info)
        return
    with pytest.raises(TeacherRefused, match=message) as caught:
        check_fits(request_, info)
    assert caught.value.status == 422
