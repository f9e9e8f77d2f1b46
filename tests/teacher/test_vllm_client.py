"""What a real server does not say on demand: limits of providers, other servers, faults. Real answers:
``tests/vllm/test_stock_server.py``."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from engine.errors import TeacherMismatch, TeacherOverloaded, TeacherRefused, TeacherUnavailable
from teacher import vllm_answers
from teacher.protocol import Scores
from teacher.same_tokens import Known, difference, known
from teacher.vllm_client import VllmClient
from tests.support.models import tiny_tokenizer

Answer = tuple[int, Any]


class Provider:
    """Speaks enough of vLLM's HTTP to be taken for one. ``says`` replaces what a path answers."""

    def __init__(self, *, cap: int = 20, names_cap: bool = True, scale_out: bool = True, logprob: float = -3.0) -> None:
        self.cap = cap
        self.logprob = logprob
        self.names_cap = names_cap
        self.scale_out = scale_out
        self.says: dict[str, Answer] = {}
        self.asked: list[tuple[str, Any]] = []

    async def handle(self, request: web.Request) -> web.Response:
        body = json.loads(await request.read() or b"null")
        self.asked.append((request.path, body))
        status, answer = self.says.get(request.path) or self.answer(request.path, body)
        if isinstance(answer, bytes):
            return web.Response(status=status, body=answer, headers={"Retry-After": "7"})
        return web.json_response(answer, status=status)

    def answer(self, path: str, body: Any) -> Answer:
        match path:
            case "/health":
                return 200, None
            case "/v1/models":
                return 200, {"object": "list", "data": [{"id": "big", "max_model_len": 64}, {"id": "lora"}]}
            case "/tokenize":
                return 200, {"tokens": [], "token_strs": []}
            case "/v1/completions":
                return self.complete(body["prompt"], body)
            case "/inference/v1/generate" if self.scale_out:
                return self.complete(body["token_ids"], body["sampling_params"])
            case "/inference/v1/generate":
                return 403, {"error": {"message": "Scale-out endpoints are disabled."}}
            case _:
                return 404, {"detail": "Not Found"}

    def complete(self, ids: list[int], params: dict[str, Any]) -> Answer:
        wanted = params.get("prompt_logprobs", 0)
        if wanted > self.cap:
            named = f", which is greater than max allowed: {self.cap}" if self.names_cap else " is too much"
            return 400, {"error": {"message": f"Requested prompt logprobs of {wanted}{named}"}}
        rows = [None, *({str((i + n) % 384): {"logprob": self.logprob - n} for n in range(wanted)} for i in ids[1:])]
        return 200, {"prompt_logprobs": rows, "choices": [{"prompt_logprobs": rows}]}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return known(tiny_tokenizer(tmp_path_factory.mktemp("tokens")), vocab_size=384, source="the student")


@asynccontextmanager
async def serving(provider: Provider, vocabulary: Known, **fields: Any) -> AsyncIterator[VllmClient]:
    app = web.Application(client_max_size=1 << 24)
    app.router.add_route("*", "/{path:.*}", provider.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with VllmClient(f"http://127.0.0.1:{runner.addresses[0][1]}", known=vocabulary, **fields) as client:
        yield client
    await runner.cleanup()


async def ask(client: VllmClient, **fields: Any) -> Any:
    return await client.score(**{"prompt_ids": [1, 2], "response_ids": [3, 4, 5], "top_k": 4, **fields})


@pytest.mark.parametrize("names_cap", [True, False], ids=["named", "found by trying"])
@pytest.mark.parametrize("scale_out", [True, False])
async def test_a_cap_on_top_logprobs_is_found(vocabulary: Known, names_cap: bool, scale_out: bool) -> None:
    provider = Provider(cap=20, names_cap=names_cap, scale_out=scale_out)
    async with serving(provider, vocabulary) as client:
        assert (await client.info()).max_top_k == 20
        assert client.looked is not None
        assert client.looked.abilities.route == ("/inference/v1/generate" if scale_out else "/v1/completions")
        assert (await ask(client, top_k=20)).top_ids.shape == (3, 20)
        with pytest.raises(TeacherRefused, match="top_k=21, this teacher gives at most 20"):
            await ask(client, top_k=21)


async def test_a_server_that_passes_over_what_it_does_not_know_is_no_teacher(vocabulary: Known) -> None:
    """As most that speak OpenAI's language do: they answer, and say nothing of the prompt."""
    provider = Provider()
    for path in ("/inference/v1/generate", "/v1/completions"):
        provider.says[path] = 200, {"choices": [{"text": "!"}]}
    async with serving(provider, vocabulary) as client:
        with pytest.raises(TeacherRefused, match="does not know prompt_logprobs"):
            await client.info()


async def test_looking_at_a_server_makes_it_compute_nothing(vocabulary: Known) -> None:
    provider = Provider()
    async with serving(provider, vocabulary) as client:
        await client.info()

    sizes = [body["sampling_params"] for path, body in provider.asked if path == "/inference/v1/generate"]
    assert len(sizes) == 4
    assert all(size.get("prompt_logprobs", 1 << 30) > 1 << 20 for size in sizes if "prompt_logprobs" in size)


@pytest.mark.parametrize(
    ("status", "body", "kind", "match"),
    [
        (500, {"error": {"message": "EngineCore died"}}, TeacherUnavailable, "answered 500: EngineCore died"),
        (503, b"<html>", TeacherUnavailable, "answered 503: <html>"),
        (429, b"{}", TeacherOverloaded, "answered 429"),
        (401, {"error": "Unauthorized"}, TeacherRefused, r"Unauthorized \(no token was sent"),
        (400, {"error": {"message": "Token id 999 is out of vocabulary"}}, TeacherRefused, "out of vocabulary"),
        (200, b'{"prompt_logprobs": [null, {"1"', TeacherUnavailable, "malformed answer: not the JSON"),
        (200, {"prompt_logprobs": None}, TeacherUnavailable, "malformed answer: 5 tokens were sent"),
        (200, b" " * (1 << 20), TeacherUnavailable, "longer than the"),
    ],
)
async def test_every_fault_has_the_name_that_the_pool_knows(
    vocabulary: Known, status: int, body: Any, kind: type[Exception], match: str
) -> None:
    provider = Provider()
    async with serving(provider, vocabulary) as client:
        await client.info()
        provider.says["/inference/v1/generate"] = status, body

        with pytest.raises(kind, match=match) as caught:
            await ask(client)

    assert type(caught.value) is kind
    if isinstance(caught.value, TeacherOverloaded):
        assert caught.value.retry_after_s == 7.0


async def test_the_first_score_looks_at_the_server_and_many_at_once_look_once(vocabulary: Known) -> None:
    provider = Provider()
    async with serving(provider, vocabulary) as client:
        await asyncio.gather(*(ask(client) for _ in range(5)))

    assert [path for path, _ in provider.asked].count("/v1/models") == 1


async def test_answers_are_read_where_they_do_not_hold_up_the_loop(
    vocabulary: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megabytes of JSON, taken apart row by row in a thread."""
    threads: list[str] = []
    read = vllm_answers.scores_of

    def watched(*arguments: Any, **named: Any) -> Scores:
        threads.append(threading.current_thread().name)
        return read(*arguments, **named)

    monkeypatch.setattr(vllm_answers, "scores_of", watched)
    async with serving(Provider(), vocabulary) as client:
        await ask(client)

    assert threads
    assert all(name.startswith("teacher answers") for name in threads)
    assert not any(thread.name.startswith("teacher answers") and thread.is_alive() for thread in threading.enumerate())


async def test_tokens_that_the_server_does_not_show_are_believed_only_if_a_folder_says_them(vocabulary: Known) -> None:
    provider = Provider()
    provider.says["/tokenize"] = 404, {"detail": "Not Found"}
    async with serving(provider, vocabulary) as client:
        with pytest.raises(TeacherRefused, match=r"Not Found.*teacher\.model"):
            await client.info()
    async with serving(provider, vocabulary, must_tell=False) as client:
        assert (await client.info()).tokenizer_fingerprint == vocabulary.fingerprint
        assert client.looked is not None
        assert client.looked.num_tokens is None


async def test_a_token_that_means_something_else_is_a_mismatch(vocabulary: Known) -> None:
    provider = Provider()
    provider.says["/tokenize"] = 200, {"tokens": [1, 7], "token_strs": ["<|bos|>", "<|eos|>"]}
    async with serving(provider, vocabulary) as client:
        with pytest.raises(TeacherMismatch, match=r"'<\|eos\|>' is 7 there and 2 in the student"):
            await client.info()


async def test_ready_is_what_health_says(vocabulary: Known) -> None:
    provider = Provider()
    async with serving(provider, vocabulary) as client:
        assert await client.ready()
        provider.says["/health"] = 503, b""
        assert not await client.ready()
    assert not await client.ready(), "nobody listens"
    await client.close()


def test_the_text_holds_nearly_all_tokens_and_only_true_pairs_pass(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    mine = known(tokenizer, vocab_size=384, source="the student")
    ids = tokenizer.encode(mine.text, add_special_tokens=False)
    tokens = tokenizer.convert_ids_to_tokens(ids)

    assert len(set(ids)) == 256, "bytes that are no character by themselves are left out"
    assert difference(mine, tokens, ids) is None
    assert difference(mine, ["nowhere"], [3]) == "'nowhere' is 3 there and unknown to the student"
