"""What a teacher is asked, what it says of an answer, and what it says of itself.

The values only: how they look on a wire is ``teacher.wire``, how they are computed is a back end's business. Imports
numpy and msgspec, no torch.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from engine.errors import TeacherRefused

PROTOCOL = 1
"""Raised by one with every change of the wire format; client and service must agree."""

Values = Literal["float16", "float32"]

MAX_REQUEST_ID_CHARS = 128

LOWEST_LOGPROB = -65504.0
"""Log-probabilities are finite: what is below this, −inf too, is given as this (float16's most negative number)."""


class Scores(msgspec.Struct, frozen=True, kw_only=True):
    """Teacher's view of one response of T tokens. Row t is the distribution that token t was, or could have been, drawn
    from: after the prompt and response tokens before t. Log-probabilities are nats under the full softmax at
    temperature 1, and finite (``LOWEST_LOGPROB``)."""

    top_ids: npt.NDArray[np.int32]
    """[T, K], descending by log-probability, ties by id ascending. From a teacher in this process a whole vocabulary
    (K = V) may come in the order of ids, which spares it to sort."""
    top_logprobs: npt.NDArray[np.float32]
    """[T, K]"""
    sampled_logprobs: npt.NDArray[np.float32]
    """[T]: of the response's own tokens."""
    extra_logprobs: npt.NDArray[np.float32] | None = None
    """[T, E]: of the ids that the caller named."""


class TeacherInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What ``/v1/info`` answers."""

    model: str
    """A name for people; ``weights_fingerprint`` says which model it is."""
    vocab_size: int
    """Rows of the teacher's output layer."""
    tokenizer_size: int
    """Tokens that the tokenizer knows."""
    tokenizer_fingerprint: str
    """Hex BLAKE2b over the tokenizer's sorted (token, id) pairs (``teacher.fingerprint``).

    With ``vocab_size`` it says all there is of a vocabulary: what each id means, and how many more rows there are."""
    max_length: int
    """Prompt and response tokens together."""
    max_top_k: int
    protocol: int
    weights_fingerprint: str = ""
    """Hex BLAKE2b of the weight files (``teacher.fingerprint``, with its strength); empty: not said."""
    gives_extra_ids: bool = True
    """Whether it scores ids that the caller names."""


class ScoreRequest(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One response to be scored, as arrays. ``score_request`` makes one from what ``Teacher.score`` is called with."""

    prompt_ids: npt.NDArray[np.int32]
    """[P], P ≥ 1."""
    response_ids: npt.NDArray[np.int32]
    """[T], T ≥ 1."""
    top_k: int
    extra_ids: npt.NDArray[np.int32] | None = None
    """[T, E]"""
    alone: bool = False
    request_id: str | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and response together: what ``TeacherInfo.max_length`` bounds."""
        return len(self.prompt_ids) + len(self.response_ids)

    def identity(self) -> str | None:
        """Equal for requests that may be given one answer: same id *and* same content; None without an id.

        The content belongs to it because two clients, or a run and its resumed self, may number their requests alike.
        """
        if self.request_id is None:
            return None
        extra = self.extra_ids
        sizes = (len(self.prompt_ids), len(self.response_ids), -1 if extra is None else extra.shape[1], self.top_k)
        digest = hashlib.blake2b(repr((sizes, self.alone)).encode(), digest_size=16)
        for array in (self.prompt_ids, self.response_ids, extra):
            if array is not None:
                digest.update(array.tobytes())
        return f"{digest.hexdigest()} {self.request_id}"


class Teacher(Protocol):
    """One teacher, near or far. ``TeacherClient``, ``VllmClient``, ``LocalTeacher`` and ``ReplicaPool`` are
    teachers."""

    async def info(self) -> TeacherInfo: ...

    async def score(
        self,
        *,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int],
        top_k: int,
        extra_ids: npt.NDArray[np.int32] | None = None,
        alone: bool = False,
        request_id: str | None = None,
    ) -> Scores:
        """Score one response.

        Args:
            prompt_ids: at least one token.
            response_ids: T ≥ 1 tokens.
            extra_ids: [T, E] int32, ids to look up per position.
            alone: computed in a forward pass of its own, so that the answer does not depend on what else the teacher
                does.
            request_id: marks attempts at the same request: an answer that is under way or just made is given again.

        Raises:
            TeacherRefused: 4xx, never worth another attempt.
            TeacherUnavailable: this attempt failed.
        """
        ...

    async def close(self) -> None: ...


def score_request(
    *,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    top_k: int,
    extra_ids: npt.NDArray[np.int32] | None = None,
    alone: bool = False,
    request_id: str | None = None,
) -> ScoreRequest:
    """Arguments of ``Teacher.score`` as arrays, checked for what needs no model.

    Raises:
        TeacherRefused: (422) no prompt, no response, an id outside [0, 2³¹), top_k < 1, extra_ids of another shape, or
            a request_id that is empty or longer than ``MAX_REQUEST_ID_CHARS``.
    """
    response = _ids("response_ids", response_ids)
    extra = None if extra_ids is None else _ids("extra_ids", extra_ids)
    for name, array in (("prompt_ids", prompt := _ids("prompt_ids", prompt_ids)), ("response_ids", response)):
        if array.ndim != 1 or len(array) == 0:
            raise TeacherRefused(f"{name} has shape {list(array.shape)}, expected at least one id in a row", status=422)
    if extra is not None and (extra.ndim != 2 or len(extra) != len(response)):
        raise TeacherRefused(
            f"extra_ids has shape {list(extra.shape)}, expected [{len(response)}, E]: one row per response token",
            status=422,
        )
    try:
        top_k = operator.index(top_k)  # numpy's numbers included
    except TypeError:
        raise TeacherRefused(f"top_k={top_k!r}, expected a whole number", status=422) from None
    if top_k < 1:
        raise TeacherRefused(f"top_k={top_k}, expected at least 1", status=422)
    if request_id is not None and not 1 <= len(request_id) <= MAX_REQUEST_ID_CHARS:
        raise TeacherRefused(
            f"request_id has {len(request_id)} characters, expected 1 to {MAX_REQUEST_ID_CHARS}", status=422
        )
    return ScoreRequest(
        prompt_ids=prompt,
        response_ids=response,
        top_k=top_k,
        extra_ids=extra,
        alone=alone,
        request_id=request_id,
    )


def check_fits(request: ScoreRequest, info: TeacherInfo) -> None:
    """Refuse what this teacher can never answer.

    Raises:
        TeacherRefused: (422) too long, an id that the model does not have, or more values per token than it gives.
    """
    if request.num_tokens > info.max_length:
        raise TeacherRefused(
            f"{len(request.prompt_ids)} prompt and {len(request.response_ids)} response tokens are "
            f"{request.num_tokens} together, this teacher takes at most {info.max_length}; "
            "send shorter ones, or start the teacher with a larger --max-length if its model allows it",
            status=422,
        )
    for name, wanted in (("top_k", request.top_k), ("extra ids per token", _num_extra(request))):
        limit = min(info.max_top_k, info.vocab_size)
        if wanted > limit:
            raise TeacherRefused(
                f"{name}={wanted}, this teacher gives at most {limit}; "
                "ask for less or start it with a larger --max-top-k",
                status=422,
            )
    for field in ("prompt_ids", "response_ids", "extra_ids"):
        array = getattr(request, field)
        if array is not None and array.size and int(array.max()) >= info.vocab_size:
            raise TeacherRefused(
                f"{field} has id {int(array.max())}, this teacher's vocabulary ends at {info.vocab_size - 1}; "
                "do student and teacher share a tokenizer?",
                status=422,
            )


def _ids(name: str, ids: Sequence[int] | npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    array = np.asarray(ids)
    if array.size == 0:
        return array.astype(np.int32)
    if array.dtype.kind not in "iu" or int(array.min()) < 0 or int(array.max()) >= 2**31:
        raise TeacherRefused(f"{name} must be whole numbers from 0 to 2**31 - 1", status=422)
    return array.astype(np.int32)


def _num_extra(request: ScoreRequest) -> int:
    return 0 if request.extra_ids is None else int(request.extra_ids.shape[1])
