"""What a stock vLLM server can do, from what it says of itself and how it refuses.

The questions that find out are such that the server refuses them before anything is computed: each names a number that
is too large, and the refusal names the limit. Knows no connection: ``find`` is given a way to ask.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec

from engine.errors import TeacherRefused, TeacherUnavailable
from teacher.replica import MISCONFIGURED
from teacher.vllm_answers import Route, has_prompt_logprobs

Ask = Callable[[str, str, bytes | None], Awaitable[bytes]]
"""Method, path, body: the answer's body, or the errors of ``Teacher``."""

_AnswerT = TypeVar("_AnswerT")

_TOO_MANY = 1 << 30
"""More than any vocabulary has."""

_SMALLER = (8192, 1024, 256, 64, 20, 5, 1)
"""Tried one after the other where a refusal names no limit."""

WITHOUT_EXTRA_IDS = (
    "does not score ids that the caller names (prompt_logprob_token_ids: vLLM 0.32 or later on a GPU, with "
    "--enable-scale-out); use python -m teacher, or an objective on the teacher's own top-k"
)

_LIMIT = re.compile(r"max(?:imum)? allowed(?: is)?:? (\d+)")
_VOCABULARY = re.compile(r"[Vv]ocabulary size: (\d+)")


class Abilities(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    """As requests must name it."""
    version: str
    """Of vLLM; "unknown" for other servers."""
    route: Route
    max_length: int
    """Tokens that can be scored: one fewer than the server takes, which is asked to add one."""
    max_top_k: int
    vocab_size: int | None
    """None: it did not say."""
    gives_extra_ids: bool


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _Version(msgspec.Struct):
    version: str


async def find(ask: Ask, *, url: str, name: str | None) -> Abilities:
    """Look at a server that is ready.

    Args:
        name: of the model; None: the first in its list, which is the one that it was started with.

    Raises:
        TeacherRefused: it has no such model, gives no log-probabilities of a prompt, or wants another token.
        TeacherUnavailable: no answer this time.
    """
    model = _choose(_read(await ask("GET", "/v1/models", None), _Models, url).data, name, url)
    route = await _route(ask, model.id)
    max_top_k = await _max_top_k(ask, route, model.id)
    if max_top_k is None:
        raise TeacherRefused(
            f"teacher {url}{route} gives no log-probabilities of a prompt: it does not know prompt_logprobs, or gives "
            "none; use vllm serve, or python -m teacher",
            status=404,
        )
    if model.max_model_len is None:
        raise TeacherRefused(f"teacher {url}/v1/models does not say max_model_len; is it vllm serve?", status=404)
    vocab_size = await _number_in_refusal(ask, route, model.id, {"logit_bias": {str(_TOO_MANY): 0.0}}, _VOCABULARY)
    return Abilities(
        model=model.id,
        version=await _version(ask, url),
        route=route,
        max_length=model.max_model_len - 1,
        # "-1" allows as many as there are.
        max_top_k=max_top_k if vocab_size is None else min(max_top_k, vocab_size),
        vocab_size=vocab_size,
        gives_extra_ids=route == "/inference/v1/generate" and await _gives_extra_ids(ask, route, model.id),
    )


def _choose(models: list[_Model], name: str | None, url: str) -> _Model:
    for model in models:
        if name is None or model.id == name:
            return model
    has = ", ".join(repr(model.id) for model in models) or "none"
    raise TeacherRefused(f"teacher {url} has no model {name!r}, it has {has}; correct teacher.served_name", status=404)


async def _version(ask: Ask, url: str) -> str:
    try:
        return _read(await ask("GET", "/version", None), _Version, url).version
    except (TeacherRefused, TeacherUnavailable):
        return "unknown"


async def _route(ask: Ask, model: str) -> Route:
    """The better of two: refused as a whole (403) by a server that was started without --enable-scale-out, and unknown
    to older ones."""
    route: Route = "/inference/v1/generate"
    try:
        await ask("POST", route, _body(route, model, {"prompt_logprobs": _TOO_MANY}))
    except TeacherRefused as refusal:
        if refusal.status in MISCONFIGURED - {401}:
            return "/v1/completions"
    return route


async def _max_top_k(ask: Ask, route: Route, model: str) -> int | None:
    """None: it says nothing of its prompt."""
    for wanted in (_TOO_MANY, *_SMALLER):
        try:
            body = await ask("POST", route, _body(route, model, {"prompt_logprobs": wanted}))
        except TeacherRefused as refusal:
            if refusal.status in MISCONFIGURED:
                raise
            if (limit := _LIMIT.search(str(refusal))) is not None:
                # A server of which vLLM's --max-logprobs is 0 gives the token's own alone.
                return int(limit[1]) or None
            continue
        return wanted if has_prompt_logprobs(body) else None
    return None


async def _gives_extra_ids(ask: Ask, route: Route, model: str) -> bool:
    """A row too many is refused by a server that would otherwise have answered, and only by that one, for their
    number."""
    try:
        await ask("POST", route, _body(route, model, {"prompt_logprob_token_ids": [[0]] * 8}))
    except TeacherRefused as refusal:
        return "scored rows" in str(refusal)
    return False  # an unknown field, passed over


async def _number_in_refusal(
    ask: Ask, route: Route, model: str, params: dict[str, Any], pattern: re.Pattern[str]
) -> int | None:
    try:
        await ask("POST", route, _body(route, model, params))
    except TeacherRefused as refusal:
        found = pattern.search(str(refusal))
        return None if found is None else int(found[1])
    return None


def _body(route: Route, model: str, params: dict[str, Any]) -> bytes:
    params = {"max_tokens": 1, "temperature": 0.0, **params}
    if route == "/v1/completions":
        return msgspec.json.encode({"model": model, "prompt": [0, 0], **params})
    return msgspec.json.encode({"model": model, "token_ids": [0, 0], "sampling_params": params})


def _read(body: bytes, kind: type[_AnswerT], url: str) -> _AnswerT:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise TeacherUnavailable(f"{url}: not the answer of a vLLM server: {error}") from error
