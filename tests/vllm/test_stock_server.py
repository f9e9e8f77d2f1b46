"""A stock ``vllm serve`` as the teacher: what it says is what a plain forward pass says, alone and in a whole run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
import numpy as np
import pytest
import pytest_asyncio
from aiohttp import web
from structlog.testing import capture_logs
from transformers import AutoTokenizer

from engine.errors import TeacherMismatch, TeacherRefused, TeacherUnavailable
from engine.recipe import VllmTeacher
from teacher.pool import JSON_BYTES, connect
from teacher.same_tokens import Known, known
from teacher.vllm_client import VllmClient
from tests.e2e.runs import World, assert_exactly_once, events, finish, start_run
from tests.support.models import load, tiny_model, write_jsonl
from tests.teacher.test_backend_torch import assert_same, make_request, reference_scores
from tests.vllm.stock_server import StockServer, stock_server
from tests.vllm.test_teacher import ask

pytestmark = pytest.mark.asyncio(loop_scope="session")

MAX_TOP_K = 40
LENGTH = 256


@pytest.fixture(scope="module")
def folder(root: Path) -> Path:
    """Rows of padding beyond the tokenizer's, as real models have."""
    return tiny_model(
        root / "served", arch="qwen3", hidden=128, layers=1, vocab=400, max_positions=LENGTH, scale=0.1, seed=4
    )


@pytest.fixture(scope="module")
def server(folder: Path, root: Path) -> Iterator[StockServer]:
    options = ["--enable-scale-out", "--max-logprobs", str(MAX_TOP_K), "--max-model-len", str(LENGTH)]
    with stock_server(folder, root, *options, "--kv-cache-memory-bytes", str(64 << 20)) as server:
        yield server


@pytest.fixture(scope="module")
def vocabulary(folder: Path) -> Known:
    return known(AutoTokenizer.from_pretrained(folder), vocab_size=400, source="the student")


@pytest_asyncio.fixture(loop_scope="session")
async def client(server: StockServer, vocabulary: Known) -> AsyncIterator[VllmClient]:
    async with VllmClient(server.url, known=vocabulary) as client:
        yield client


@asynccontextmanager
async def without_scale_out(server: StockServer) -> AsyncIterator[str]:
    """The same server as one that was started without --enable-scale-out: it refuses that route as a whole."""

    async def pass_on(request: web.Request) -> web.Response:
        if request.path.startswith("/inference/"):
            return web.json_response({"error": {"message": "Scale-out endpoints are disabled."}}, status=403)
        async with (
            aiohttp.ClientSession() as session,
            session.request(
                request.method,
                server.url + request.path,
                data=await request.read() or None,
                headers={"Content-Type": "application/json"},
            ) as answer,
        ):
            return web.Response(status=answer.status, body=await answer.read(), content_type="application/json")

    app = web.Application(client_max_size=1 << 24)
    app.router.add_route("*", "/{path:.*}", pass_on)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_what_it_can_do_is_found_without_computing(client: VllmClient, vocabulary: Known, folder: Path) -> None:
    info = await client.info()

    assert client.looked is not None
    assert client.looked.abilities.route == "/inference/v1/generate"
    assert (info.model, info.max_length, info.max_top_k, info.vocab_size) == (str(folder), LENGTH - 1, MAX_TOP_K, 400)
    assert info.tokenizer_fingerprint == vocabulary.fingerprint
    assert not info.gives_extra_ids, "on CPU"
    assert client.looked.num_tokens is not None
    assert client.looked.num_tokens > 250, "of 384, of which 128 are bytes that are no character by themselves"
    assert await client.ready()


@pytest.mark.parametrize("route", ["/inference/v1/generate", "/v1/completions"])
async def test_answers_equal_a_plain_forward_pass_in_float64(
    server: StockServer, vocabulary: Known, folder: Path, route: str
) -> None:
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 384, 9).tolist()
    requests = [
        make_request(rng, prompt=prompt, num_response=11, top_k=1),
        make_request(rng, num_prompt=1, num_response=1, top_k=MAX_TOP_K),
        make_request(rng, num_prompt=60, num_response=LENGTH - 61, top_k=8),
        *(make_request(rng, prompt=prompt, num_response=30, top_k=32) for _ in range(4)),
    ]

    async with without_scale_out(server) as other_url:
        url = server.url if route == "/inference/v1/generate" else other_url
        async with VllmClient(url, known=vocabulary) as client:
            answers = await asyncio.gather(*(ask(client, request) for request in requests))
            assert client.looked is not None
            assert client.looked.abilities.route == route

    model = load(folder)
    for request, answer in zip(requests, answers, strict=True):
        assert_same(answer, reference_scores(model, request))


async def test_what_it_does_not_give_is_refused_with_the_way_out(client: VllmClient) -> None:
    ids = {"prompt_ids": [3, 4], "response_ids": [5]}
    for fields, match in (
        ({"top_k": MAX_TOP_K + 1}, f"at most {MAX_TOP_K}"),
        ({"top_k": 2, "extra_ids": np.array([[7]], np.int32)}, "prompt_logprob_token_ids"),
        ({"top_k": 2, "alone": True}, "deterministic"),
        ({"top_k": 2, "response_ids": [5] * LENGTH}, "together"),
    ):
        with pytest.raises(TeacherRefused, match=match):
            await client.score(**{**ids, **fields})  # type: ignore[arg-type]


async def test_another_vocabulary_or_name_is_refused_before_any_work(server: StockServer, vocabulary: Known) -> None:
    moved = {token: token_id + (token_id >= 200) for token, token_id in vocabulary.ids.items()}
    other = msgspec.structs.replace(vocabulary, ids=moved)
    async with VllmClient(server.url, known=other) as client:
        with pytest.raises(TeacherMismatch, match=r"is 2\d\d there and 2\d\d in the student"):
            await client.info()
    async with VllmClient(server.url, known=vocabulary, served_name="nobody") as client:
        with pytest.raises(TeacherRefused, match=r"no model 'nobody', it has '.*served'"):
            await client.info()


async def test_it_is_a_replica_like_others_in_a_pool(server: StockServer, vocabulary: Known, folder: Path) -> None:
    request = make_request(np.random.default_rng(3), num_response=20)
    with capture_logs() as lines:
        pool = connect(VllmTeacher(urls=(server.url,), top_k=8), known=vocabulary)
        answer = await ask(pool, request)
        await pool.close()

    assert_same(answer, reference_scores(load(folder), request))
    assert [line["event"] for line in lines if line["log_level"] == "warning"] == ["teacher.sends_json"]


async def test_a_run_learns_from_it_with_as_many_values_as_it_gives(
    server: StockServer, folder: Path, root: Path, tmp_path: Path
) -> None:
    world = World(folder=root / "stock_world")
    tiny_model(world.student, hidden=32, layers=1, vocab=400, seed=2)
    write_jsonl(world.prompts, [{"prompt": f"Tell me about number {i}."} for i in range(24)])
    recipe, out = world.recipe(tmp_path / "r.py", urls=(server.url,)), tmp_path / "out"
    stock = f"VllmTeacher(on_top_k_cap='lower', model={str(folder)!r}, "
    recipe.write_text(recipe.read_text().replace("HttpTeacher(", stock).replace("top_k=16", "top_k=64"))

    finished = await asyncio.to_thread(finish, start_run(recipe, "--out", str(out), "--json"))

    assert finished.code == 0, finished.stderr[-3000:]
    (lowered,) = [line for line in events(out) if line["event"] == "teacher.top_k_lowered"]
    assert (lowered["wanted"], lowered["given"]) == (64, MAX_TOP_K)
    (cost,) = [line for line in events(out) if line["event"] == "teacher.sends_json"]
    assert cost["bytes_per_token"] == (MAX_TOP_K + 1) * JSON_BYTES
    assert_exactly_once(out, steps=6, per_step=4, max_staleness=1)


async def test_an_engine_that_is_killed_is_a_replica_that_is_away(client: VllmClient, server: StockServer) -> None:
    """The last one here: nothing answers afterwards."""
    await client.info()
    under_way = asyncio.create_task(client.score(prompt_ids=[3] * 100, response_ids=[4] * 100, top_k=1))
    server.kill_engine()
    await asyncio.gather(under_way, return_exceptions=True)  # answered before, or not

    with pytest.raises(TeacherUnavailable):
        await client.score(prompt_ids=[3], response_ids=[4], top_k=1)
    assert not await client.ready()
