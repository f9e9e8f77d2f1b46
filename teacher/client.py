"""One teacher service over HTTP, usable alone. Decides what is asked for and whether it was given; never asks twice.

What a failure is called is ``teacher.connection``'s decision; retries, deadlines over several attempts and the choice
among replicas belong to ``teacher.pool``. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import msgspec
import numpy as np
import numpy.typing as npt

from engine.errors import MalformedFrame, TeacherRefused, TeacherUnavailable
from teacher import wire
from teacher.connection import MAX_SMALL_ANSWER_BYTES, Connection, Reason
from teacher.protocol import PROTOCOL, ScoreRequest, Scores, TeacherInfo, Values, score_request

_info_decoder = msgspec.json.Decoder(TeacherInfo)
_error_decoder = msgspec.json.Decoder(wire.ErrorAnswer)


class TeacherClient:
    """A ``Teacher`` at ``url``. Connections are kept and shared by all calls, of which any number may be open.

    Args:
        url: for example ``http://127.0.0.1:8900``.
        token: bearer token of the service; None: it has none.
        token_file: where to read ``token`` from instead; named in the error when the service does not accept it.
        values: packing of log-probabilities on the wire (docs/protocol.md has the precision).
        timeout_s: longest time that one call may take, connecting included.

    Raises:
        UserError: not an http(s) URL, or the token file cannot be read.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        token_file: str | None = None,
        values: Values = "float16",
        timeout_s: float = 120.0,
    ) -> None:
        self._connection = Connection(
            url, token=token, token_file=token_file, timeout_s=timeout_s, reason_of=_reason_of
        )
        self.url = self._connection.url
        self._values = values

    def __repr__(self) -> str:
        return f"TeacherClient({self.url!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def info(self) -> TeacherInfo:
        """What the service says of itself.

        Raises:
            TeacherRefused: 4xx, or the service speaks another protocol version.
            TeacherUnavailable: no answer this time.
        """
        body = await self._connection.call("GET", "/v1/info", max_bytes=MAX_SMALL_ANSWER_BYTES)
        try:
            info = _info_decoder.decode(body)
        except msgspec.MsgspecError as error:
            raise TeacherUnavailable(f"{self.url}/v1/info: not the answer of a teacher: {error}") from error
        if info.protocol != PROTOCOL:
            raise TeacherRefused(
                f"teacher {self.url} speaks protocol {info.protocol}, this client speaks {PROTOCOL}; "
                "upgrade the older side",
            )
        return info

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
        """Score one response; as ``Teacher.score``. Cancelling the call takes the request out of the service's queue.

        Raises:
            TeacherRefused: 4xx, never worth another attempt; ``status`` is the HTTP status.
            TeacherOverloaded: 429.
            TeacherUnavailable: this attempt failed: not reached, timed out, 5xx, or a torn or malformed answer.
        """
        request = score_request(
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            top_k=top_k,
            extra_ids=extra_ids,
            alone=alone,
            request_id=request_id,
        )
        max_bytes = wire.answer_bytes(request, values=self._values)
        frame = wire.encode_request(request, values=self._values)
        body = await self._connection.call(
            "POST", "/v1/score", data=frame, content_type=wire.CONTENT_TYPE, max_bytes=max_bytes
        )
        try:
            scores = wire.decode_answer(body)
        except MalformedFrame as error:
            raise TeacherUnavailable(f"{self.url}/v1/score: malformed answer: {error}") from error
        _check_answers(scores, request, self.url)
        return scores

    async def ready(self) -> bool:
        """Whether the service would take a request now. Never raises: not reached is not ready."""
        try:
            await self._connection.call("GET", "/readyz", max_bytes=MAX_SMALL_ANSWER_BYTES)
        except (TeacherUnavailable, TeacherRefused):
            return False
        return True

    async def close(self) -> None:
        """Close the connections. Idempotent; calls that are open fail with ``TeacherUnavailable``."""
        await self._connection.close()


def _reason_of(body: bytes) -> Reason | None:
    try:
        answer = _error_decoder.decode(body)
    except msgspec.MsgspecError:
        return None
    return Reason(answer.error, answer.retry_after_s)


def _check_answers(scores: Scores, request: ScoreRequest, url: str) -> None:
    got = (scores.top_ids.shape, None if scores.extra_logprobs is None else scores.extra_logprobs.shape)
    expected = (
        (len(request.response_ids), request.top_k),
        None if request.extra_ids is None else request.extra_ids.shape,
    )
    if got != expected:
        raise TeacherUnavailable(
            f"{url}/v1/score: the answer has top-k and extra values of shapes {got}, the request asked for {expected}"
        )
