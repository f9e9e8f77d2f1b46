"""One teacher service over HTTP, usable alone. Decides how an answer, or the lack of one, is called; never asks twice.

Retries, deadlines over several attempts and the choice among replicas belong to ``teacher.pool``. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import NoReturn, Self
from urllib.parse import urlsplit

import aiohttp
import msgspec
import numpy as np
import numpy.typing as npt

from engine.errors import MalformedFrame, TeacherOverloaded, TeacherRefused, TeacherUnavailable, UserError
from teacher import wire
from teacher.protocol import PROTOCOL, ScoreRequest, Scores, TeacherInfo, Values, score_request
from teacher.token import read_token

_MAX_SMALL_ANSWER_BYTES = 64 << 10
"""Of anything that is not scores: information, errors."""

_LONGEST_RETRY_AFTER_S = 600.0


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
        if not _is_url(url):
            raise UserError(f"teacher url {url!r} is not one; expected for example http://127.0.0.1:8900")
        self.url = url.rstrip("/")
        self._token_file = token_file
        self._token = read_token(token_file) if token_file is not None else token
        self._values = values
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None

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
        body = await self._call("GET", "/v1/info", max_bytes=_MAX_SMALL_ANSWER_BYTES)
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
        body = await self._call("POST", "/v1/score", data=frame, max_bytes=max_bytes)
        try:
            scores = wire.decode_answer(body)
        except MalformedFrame as error:
            raise TeacherUnavailable(f"{self.url}/v1/score: malformed answer: {error}") from error
        _check_answers(scores, request, self.url)
        return scores

    async def ready(self) -> bool:
        """Whether the service would take a request now. Never raises: not reached is not ready."""
        try:
            await self._call("GET", "/readyz", max_bytes=_MAX_SMALL_ANSWER_BYTES)
        except (TeacherUnavailable, TeacherRefused):
            return False
        return True

    async def close(self) -> None:
        """Close the connections. Idempotent; calls that are open fail with ``TeacherUnavailable``."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _call(self, method: str, path: str, *, max_bytes: int, data: bytes | None = None) -> bytes:
        headers = {} if data is None else {"Content-Type": wire.CONTENT_TYPE}
        try:
            async with self._open_session().request(
                method, self.url + path, data=data, headers=headers, allow_redirects=False
            ) as response:
                is_ok = response.status == 200
                body = await _read(response, max_bytes if is_ok else _MAX_SMALL_ANSWER_BYTES)
        except TimeoutError as error:
            raise TeacherUnavailable(f"{self.url}{path}: no answer within {self._timeout_s:g} s") from error
        # A session that is closed under a call makes it fail with RuntimeError or OSError.
        except (aiohttp.ClientError, OSError, RuntimeError, EOFError) as error:
            raise TeacherUnavailable(f"{self.url}{path}: {error or type(error).__name__}") from error
        if not is_ok:
            self._raise_for(path, response.status, response.headers.get("Retry-After"), body)
        return body

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            headers = {"Accept-Encoding": "identity"}
            if self._token is not None:
                headers["Authorization"] = f"Bearer {self._token}"
            self._session = aiohttp.ClientSession(
                # Callers bound what is open; a second limit here would only make some of them wait unseen.
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=self._timeout_s),
                headers=headers,
            )
        return self._session

    def _raise_for(self, path: str, status: int, retry_after: str | None, body: bytes) -> NoReturn:
        try:
            answer = _error_decoder.decode(body)
        except msgspec.MsgspecError:  # a proxy's page, say
            answer = wire.ErrorAnswer(error=body[:200].decode("utf-8", "replace").strip() or "no reason given")
        message = f"teacher {self.url}{path} answered {status}: {answer.error}"
        if status == 429:
            seconds = answer.retry_after_s if answer.retry_after_s is not None else _seconds(retry_after)
            raise TeacherOverloaded(message, retry_after_s=min(max(0.0, seconds), _LONGEST_RETRY_AFTER_S))
        if status in (401, 403):
            where = "no token was sent; set one"
            if self._token_file is not None:
                where = f"the token sent is the first line of {self._token_file!r}; does the service read the same one?"
            elif self._token is not None:
                where = "a token was sent, but it is another one"
            raise TeacherRefused(f"{message} ({where})", status=status)
        if 400 <= status < 500 and status != 408:
            raise TeacherRefused(message, status=status)
        raise TeacherUnavailable(message)


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a bracket that is not closed, a port that is no number or too large
        return False


async def _read(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """The whole body; EOFError when it is longer than agreed."""
    chunks = []
    num_bytes = 0
    async for chunk in response.content.iter_any():
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise EOFError(f"the answer is longer than the {max_bytes} bytes that were expected")
        chunks.append(chunk)
    return b"".join(chunks)


def _seconds(header: str | None) -> float:
    """``Retry-After`` in seconds; 1 when it is missing, or a date."""
    try:
        return float(header) if header is not None else 1.0
    except ValueError:
        return 1.0


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
