"""A stock ``vllm serve`` as one teacher, usable alone. Decides what is asked for and whether it was given.

What the server can do is found by ``teacher.vllm_abilities``, what its JSON means by ``teacher.vllm_answers``. Such a
server has no fingerprint of its vocabulary and writes numbers as text: ``python -m teacher --backend vllm`` says both
in a tenth of the bytes. Imports no torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import msgspec
import numpy as np
import numpy.typing as npt

from engine.errors import MalformedFrame, TeacherMismatch, TeacherRefused, TeacherUnavailable
from teacher import vllm_answers
from teacher.connection import MAX_SMALL_ANSWER_BYTES, Connection, Reason
from teacher.protocol import PROTOCOL, Scores, TeacherInfo, check_fits, score_request
from teacher.same_tokens import Known, difference
from teacher.vllm_abilities import WITHOUT_EXTRA_IDS, Abilities, find

_JSON = "application/json"


class Looked(msgspec.Struct, frozen=True, kw_only=True):
    """What was found out about a server."""

    abilities: Abilities
    num_tokens: int | None
    """Different tokens of which it was seen that the server means the same ones; None: it has no /tokenize."""


class VllmClient:
    """A ``Teacher`` at ``url``. Connections are kept and shared by all calls, of which any number may be open.

    Answers are read in a thread of this object, which ends with ``close``.

    Args:
        url: for example ``http://127.0.0.1:8000``.
        known: the vocabulary that the server must have.
        must_tell: the server has to show its tokens (``/tokenize``); False: what ``known`` says is believed where it
            cannot.
        served_name: of the model; None: the first that the server lists.
        token: bearer token of the server (its ``--api-key``); None: it has none.
        token_file: where to read ``token`` from instead; named in the error when the server does not accept it.
        timeout_s: longest time that one call may take, connecting included.

    Raises:
        UserError: not an http(s) URL, or the token file cannot be read.
    """

    def __init__(
        self,
        url: str,
        *,
        known: Known,
        must_tell: bool = True,
        served_name: str | None = None,
        token: str | None = None,
        token_file: str | None = None,
        timeout_s: float = 120.0,
    ) -> None:
        self._connection = Connection(
            url, token=token, token_file=token_file, timeout_s=timeout_s, reason_of=_reason_of
        )
        self.url = self._connection.url
        self._known = known
        self._must_tell = must_tell
        self._served_name = served_name
        self.looked: Looked | None = None
        """What ``info`` saw last."""
        self._looking = asyncio.Lock()
        self._reader: ThreadPoolExecutor | None = None

    def __repr__(self) -> str:
        return f"VllmClient({self.url!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def info(self) -> TeacherInfo:
        """What the server can do and is, looked at anew. It computes nothing for that.

        Raises:
            TeacherMismatch: it means other tokens by the same ids.
            TeacherRefused: no such model, or no log-probabilities of prompts, or another token is wanted.
            TeacherUnavailable: no answer this time.
        """
        abilities = await find(self._ask, url=self.url, name=self._served_name)
        self.looked = Looked(abilities=abilities, num_tokens=await self._compare_tokens(abilities))
        return self._info(abilities)

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
        """Score one response; as ``Teacher.score``. The first call looks at the server if nobody has.

        ``request_id`` is not sent: such a server computes a repeated request again.

        Raises:
            TeacherRefused: 4xx, or more than the server gives, or ``alone``, which it cannot promise.
            TeacherMismatch: as ``info``, at the first call.
            TeacherOverloaded: 429.
            TeacherUnavailable: this attempt failed: not reached, timed out, 5xx, or a torn or malformed answer.
        """
        request = score_request(
            prompt_ids=prompt_ids, response_ids=response_ids, top_k=top_k, extra_ids=extra_ids, request_id=request_id
        )
        abilities = await self._abilities()
        info = self._info(abilities)
        check_fits(request, info)
        if alone:
            raise TeacherRefused(
                f"teacher {self.url}: a stock vLLM server computes requests together as they come, so none can be "
                "scored alone; use python -m teacher for deterministic runs",
                status=422,
            )
        if extra_ids is not None and not abilities.gives_extra_ids:
            raise TeacherRefused(f"teacher {self.url} {WITHOUT_EXTRA_IDS}", status=422)
        body = await self._connection.call(
            "POST",
            abilities.route,
            data=vllm_answers.question(abilities.route, request, model=abilities.model),
            content_type=_JSON,
            max_bytes=vllm_answers.most_bytes(request),
        )
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._thread(), lambda: vllm_answers.scores_of(body, request, vocab_size=info.vocab_size)
            )
        except MalformedFrame as error:
            raise TeacherUnavailable(f"{self.url}{abilities.route}: malformed answer: {error}") from error

    async def ready(self) -> bool:
        """Whether the server would take a request now. Never raises: not reached is not ready."""
        try:
            await self._connection.call("GET", "/health", max_bytes=MAX_SMALL_ANSWER_BYTES)
        except (TeacherUnavailable, TeacherRefused):
            return False
        return True

    async def close(self) -> None:
        """Close the connections and end the thread. Idempotent; calls that are open fail."""
        reader, self._reader = self._reader, None
        await self._connection.close()
        if reader is not None:
            await asyncio.to_thread(reader.shutdown)  # what has arrived is read to its end

    async def _abilities(self) -> Abilities:
        if self.looked is None:
            async with self._looking:
                if self.looked is None:
                    await self.info()
        assert self.looked is not None
        return self.looked.abilities

    async def _ask(self, method: str, path: str, data: bytes | None) -> bytes:
        content_type = None if data is None else _JSON
        return await self._connection.call(
            method, path, data=data, content_type=content_type, max_bytes=MAX_SMALL_ANSWER_BYTES
        )

    async def _compare_tokens(self, abilities: Abilities) -> int | None:
        mine = self._known
        question = {"model": abilities.model, "prompt": mine.text, "add_special_tokens": False}
        try:
            body = await self._connection.call(
                "POST",
                "/tokenize",
                data=msgspec.json.encode(question | {"return_token_strs": True}),
                content_type=_JSON,
                # A token is at least a byte of the text, and its text and number take a few tens.
                max_bytes=(1 << 16) + 64 * len(mine.text.encode("utf-8", "surrogatepass")),
            )
        except TeacherRefused as refusal:
            if refusal.status == 401 or self._must_tell:
                raise TeacherRefused(
                    f"{refusal}. So nobody knows whether its ids mean the same tokens; name the folder of its model in "
                    "teacher.model to have that one's tokenizer believed",
                    status=refusal.status,
                ) from refusal
            return None
        try:
            tokens = msgspec.json.decode(body, type=_Tokens)
            why = difference(mine, tokens.token_strs, tokens.tokens)
        except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as error:
            raise TeacherUnavailable(f"{self.url}/tokenize: not the answer of a vLLM server: {error}") from error
        if why is not None:
            raise TeacherMismatch(
                f"teacher {self.url} ({abilities.model}) has another tokenizer: token {why}; use a teacher and a "
                "student of one family"
            )
        return len(set(tokens.tokens))

    def _info(self, abilities: Abilities) -> TeacherInfo:
        return TeacherInfo(
            model=abilities.model,
            vocab_size=abilities.vocab_size or self._known.vocab_size,
            tokenizer_size=len(self._known.ids),
            tokenizer_fingerprint=self._known.fingerprint,
            max_length=abilities.max_length,
            max_top_k=abilities.max_top_k,
            protocol=PROTOCOL,
            gives_extra_ids=abilities.gives_extra_ids,
        )

    def _thread(self) -> ThreadPoolExecutor:
        if self._reader is None:
            self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher answers")
        return self._reader


class _Tokens(msgspec.Struct):
    tokens: list[int]
    token_strs: list[str]


class _ErrorBody(msgspec.Struct):
    message: str


class _Error(msgspec.Struct):
    """vLLM's own; of its guard (``"Unauthorized"``); of its router (``"Not Found"``)."""

    error: _ErrorBody | str | None = None
    detail: str | None = None


_error_decoder = msgspec.json.Decoder(_Error)


def _reason_of(body: bytes) -> Reason | None:
    try:
        answer = _error_decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    error = answer.error.message if isinstance(answer.error, _ErrorBody) else answer.error
    text = error or answer.detail
    return None if text is None else Reason(text)
