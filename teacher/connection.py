"""One HTTP service and how its failures are called: what the clients of all kinds of teachers share.

Decides which outcome is final and which is worth another attempt; knows no path and no body but those of errors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, NoReturn
from urllib.parse import urlsplit

import aiohttp

from engine.errors import TeacherOverloaded, TeacherRefused, TeacherUnavailable, TeacherUnreachable, UserError
from teacher.token import read_token

MAX_SMALL_ANSWER_BYTES = 64 << 10
"""Of anything that is not scores: information, errors."""

_LONGEST_RETRY_AFTER_S = 600.0


class Reason(NamedTuple):
    """What the body of an error says."""

    text: str
    retry_after_s: float | None = None


class Connection:
    """Connections to ``url``, kept and shared by all calls, of which any number may be open.

    Args:
        url: for example ``http://127.0.0.1:8900``.
        token: bearer token of the service; None: it has none.
        token_file: where to read ``token`` from instead; named in the error when the service does not accept it.
        timeout_s: longest time that one call may take, connecting included.
        reason_of: reads an error's body; None: it is not such a body.

    Raises:
        UserError: not an http(s) URL, or the token file cannot be read.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None,
        token_file: str | None,
        timeout_s: float,
        reason_of: Callable[[bytes], Reason | None],
    ) -> None:
        if not _is_url(url):
            raise UserError(f"teacher url {url!r} is not one; expected for example http://127.0.0.1:8900")
        self.url = url.rstrip("/")
        self._token_file = token_file
        self._token = read_token(token_file) if token_file is not None else token
        self._timeout_s = timeout_s
        self._reason_of = reason_of
        self._session: aiohttp.ClientSession | None = None

    async def call(
        self, method: str, path: str, *, max_bytes: int, data: bytes | None = None, content_type: str | None = None
    ) -> bytes:
        """The body of a 200.

        Raises:
            TeacherRefused: 4xx, never worth another attempt; ``status`` is the HTTP status.
            TeacherOverloaded: 429.
            TeacherUnreachable: nobody answers.
            TeacherUnavailable: 5xx, or torn or longer than ``max_bytes``.
        """
        headers = {} if content_type is None else {"Content-Type": content_type}
        try:
            async with self._open_session().request(
                method, self.url + path, data=data, headers=headers, allow_redirects=False
            ) as response:
                is_ok = response.status == 200
                body = await _read(response, max_bytes if is_ok else MAX_SMALL_ANSWER_BYTES)
        except TimeoutError as error:
            raise TeacherUnreachable(f"{self.url}{path}: no answer within {self._timeout_s:g} s") from error
        except aiohttp.ClientConnectorError as error:
            raise TeacherUnreachable(f"{self.url}{path}: {error}") from error
        # A session that is closed under a call makes it fail with RuntimeError or OSError.
        except (aiohttp.ClientError, OSError, RuntimeError, EOFError) as error:
            raise TeacherUnavailable(f"{self.url}{path}: {error or type(error).__name__}") from error
        if not is_ok:
            self._raise_for(path, response.status, response.headers.get("Retry-After"), body)
        return body

    async def close(self) -> None:
        """Close the connections. Idempotent; calls that are open fail with ``TeacherUnavailable``."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

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
        # Else a proxy's page, say.
        reason = self._reason_of(body) or Reason(body[:200].decode("utf-8", "replace").strip() or "no reason given")
        message = f"teacher {self.url}{path} answered {status}: {reason.text}"
        if status == 429:
            seconds = reason.retry_after_s if reason.retry_after_s is not None else _seconds(retry_after)
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
