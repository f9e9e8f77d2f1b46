"""The service as it is run: a process of its own, a real model, real signals, hostile clients."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from engine.errors import TeacherRefused, TeacherUnavailable
from engine.recipe import LocalTeacher as LocalTeacherConfig
from teacher import wire
from teacher.client import TeacherClient
from teacher.fingerprint import fingerprint, weights_fingerprint
from teacher.local import LocalTeacher
from teacher.protocol import score_request
from teacher.replica import difference
from tests.support.models import load, tiny_tokenizer
from tests.teacher.conftest import Service
from tests.teacher.test_backend_torch import TOLERANCE, assert_same, make_request, reference_scores

StartService = Callable[..., Service]

SLOW = "tests.teacher.slow_teacher"

NUM_REQUESTS = 60
"""Enough to last longer than a signal takes."""


@pytest.fixture(scope="module")
def service(start_service: StartService) -> Service:
    """One for all tests that leave it as it was."""
    return start_service("--max-request-bytes", "20000", "--max-top-k", "384")


@pytest.fixture
async def client(service: Service) -> AsyncIterator[TeacherClient]:
    async with await ready_client(service, values="float32") as client:
        yield client


async def ready_client(service: Service, **options: str) -> TeacherClient:
    client = TeacherClient(await asyncio.to_thread(lambda: service.url), **options)  # type: ignore[arg-type]
    async with asyncio.timeout(60):
        while not await client.ready():
            assert service.process.poll() is None, service.log
    return client


async def test_answers_over_http_equal_a_plain_forward_pass(client: TeacherClient, teacher_folder: Path) -> None:
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 384, 9).tolist()
    requests = [make_request(rng, prompt=prompt, num_extra=2) for _ in range(4)] + [make_request(rng, top_k=384)]

    answers = await asyncio.gather(
        *(
            client.score(
                prompt_ids=request.prompt_ids.tolist(),
                response_ids=request.response_ids.tolist(),
                top_k=request.top_k,
                extra_ids=request.extra_ids,
            )
            for request in requests
        )
    )

    model = load(teacher_folder)
    for request, answer in zip(requests, answers, strict=True):
        assert_same(answer, reference_scores(model, request))


async def test_float16_answers_are_within_the_documented_bound(service: Service, client: TeacherClient) -> None:
    async with await ready_client(service) as half:
        ids = list(range(40))
        exact = await client.score(prompt_ids=ids, response_ids=ids, top_k=64)
        packed = await half.score(prompt_ids=ids, response_ids=ids, top_k=64)

    bound = np.abs(exact.top_logprobs) * 2.0**-11 + 1e-5
    assert (np.abs(packed.top_logprobs - exact.top_logprobs) <= bound).all()


async def test_an_answer_computed_alone_has_the_same_bits_under_load(client: TeacherClient) -> None:
    quiet = await client.score(prompt_ids=[1, 2], response_ids=[3, 4], top_k=8, alone=True)
    others = [client.score(prompt_ids=[1, 2], response_ids=[n], top_k=8) for n in range(6)]

    *_, loud = await asyncio.gather(*others, client.score(prompt_ids=[1, 2], response_ids=[3, 4], top_k=8, alone=True))

    np.testing.assert_array_equal(loud.top_logprobs, quiet.top_logprobs)


async def test_info_has_the_fingerprints_of_tokenizer_and_weights(
    client: TeacherClient, teacher_folder: Path, tmp_path: Path
) -> None:
    info = await client.info()

    assert info.tokenizer_fingerprint == fingerprint(tiny_tokenizer(tmp_path))
    assert info.weights_fingerprint == weights_fingerprint(teacher_folder)
    assert (info.model, info.vocab_size, info.max_top_k) == ("tiny-teacher", 384, 384)


async def test_the_teacher_in_process_says_what_the_service_says(client: TeacherClient, teacher_folder: Path) -> None:
    local = LocalTeacher(LocalTeacherConfig(model=str(teacher_folder)))
    near, far = [
        await teacher.score(
            prompt_ids=[1, 2, 3], response_ids=[4, 5], top_k=6, extra_ids=np.array([[7], [8]], np.int32)
        )
        for teacher in (local, client)
    ]

    np.testing.assert_array_equal(near.top_ids, far.top_ids)
    np.testing.assert_allclose(near.top_logprobs, far.top_logprobs, atol=TOLERANCE)
    assert near.extra_logprobs is not None
    assert far.extra_logprobs is not None
    np.testing.assert_allclose(near.extra_logprobs, far.extra_logprobs, atol=TOLERANCE)
    assert difference(await client.info(), await local.info()) is None
    await local.close()
    await local.close()


async def raw(url: str, data: bytes, *, hang_up: bool = False) -> str:
    """The status of the answer to these bytes on a fresh connection; empty when there is none or we hang up."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(data)
        await writer.drain()
        async with asyncio.timeout(20):
            return "" if hang_up else (await reader.readline())[9:12].decode("ascii")
    except ConnectionError:
        return ""
    finally:
        writer.close()


def post(body: bytes, *, length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    return (
        f"POST /v1/score HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n".encode() + body
    )


async def test_hostile_bytes_are_answered_with_4xx_and_the_service_goes_on(
    service: Service, client: TeacherClient
) -> None:
    random_ = random.Random(0)
    good = wire.encode_request(score_request(prompt_ids=[1, 2], response_ids=[3], top_k=2), values="float16")
    prefix = struct.Struct("<4sHBBI")
    bodies = [random_.randbytes(random_.randrange(300)) for _ in range(40)]
    bodies += [good[: random_.randrange(len(good))] for _ in range(20)]
    for _ in range(40):
        changed = bytearray(good)
        changed[random_.randrange(12, len(good) - 6)] ^= 1 << random_.randrange(8)
        bodies.append(bytes(changed))
    bodies += [
        prefix.pack(b"TWF1", 1, 1, 0, 1000) + b"\x91" * 1000,  # nested arrays
        prefix.pack(b"TWF1", 1, 1, 0, 1000) + b"\x81\xa1x" * 333 + b"\xc0",  # nested maps
        prefix.pack(b"TWF1", 1, 1, 0, 5) + b"\xdd\xff\xff\xff\xff",  # four billion elements
        prefix.pack(b"TWF1", 1, 1, 0, 2**32 - 1),
        b"\0" * 20_001,
    ]
    statuses = [await raw(service.url, post(body)) for body in bodies]

    assert {status[0] for status in statuses} <= {"2", "4"}  # a changed bit may well be a request that is fine
    assert statuses.count("413") == 1
    for garbage in (b"\0" * 5000, b"POST /v1/score HTTP/9.9\r\n\r\n", post(b"", length=10**12)):
        assert (await raw(service.url, garbage)).startswith("4")
    for torn in (b"", b"GET", post(good, length=500), post(good[:20], length=len(good))):
        await raw(service.url, torn, hang_up=True)
    assert (await client.score(prompt_ids=[1], response_ids=[2], top_k=1)).top_ids.shape == (1, 1)
    assert service.process.poll() is None
    assert "Traceback" not in service.log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_ids": [384]}, "prompt_ids has id 384, this teacher's vocabulary ends at 383"),
        ({"response_ids": [1] * 512}, "513 together, this teacher takes at most 512"),
        ({"top_k": 385}, "top_k=385, this teacher gives at most 384"),
        ({"extra_ids": np.full((1, 1), 500, np.int32)}, "extra_ids has id 500"),
    ],
)
async def test_what_the_model_cannot_answer_is_422(
    arguments: dict[str, object], message: str, client: TeacherClient
) -> None:
    with pytest.raises(TeacherRefused, match=message) as caught:
        await client.score(**({"prompt_ids": [1], "response_ids": [2], "top_k": 1} | arguments))  # type: ignore[arg-type]
    assert caught.value.status == 422


def score_many(client: TeacherClient, num_requests: int) -> list[asyncio.Task[object]]:
    """Long ones without a common prefix: each is a batch of its own when 400 tokens make one."""
    rng = np.random.default_rng(0)
    return [
        asyncio.create_task(
            client.score(prompt_ids=rng.integers(0, 384, 250).tolist(), response_ids=[1] * 250, top_k=8)
        )
        for _ in range(num_requests)
    ]


async def metrics(service: Service) -> dict[str, float]:
    async with aiohttp.ClientSession() as http, http.get(service.url + "/metrics") as response:
        lines = [line.split() for line in (await response.text()).splitlines() if line[0] != "#"]
    return {name: float(value) for name, value in lines}


async def until_taken(service: Service, num_requests: int, *, scored_before: float = 0) -> None:
    """The service has taken this many requests beyond those that it scored before, and has not answered all."""
    async with asyncio.timeout(30):
        while True:
            now = await metrics(service)
            under_way = now["teacher_waiting_requests"] + now["teacher_computing_requests"]
            if under_way and under_way + now["teacher_scored_requests_total"] - scored_before == num_requests:
                return


async def test_sigterm_answers_everything_that_was_taken_and_refuses_what_is_new(start_service: StartService) -> None:
    service = start_service("--max-batch-tokens", "400", module=SLOW)
    async with await ready_client(service) as client:
        tasks = score_many(client, NUM_REQUESTS)
        await until_taken(service, NUM_REQUESTS)
        service.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            while await client.ready():
                pass
        with pytest.raises(TeacherUnavailable):
            await client.score(prompt_ids=[1], response_ids=[2], top_k=1)

        answers = await asyncio.gather(*tasks)

    assert len(answers) == NUM_REQUESTS
    assert await asyncio.to_thread(service.exit_code) == 0
    events = [json.loads(line) for line in service.log.splitlines()]
    assert [e["event"] for e in events if e["event"].startswith("teacher.")] == [
        "teacher.listening",
        "teacher.ready",
        "teacher.draining",
        "teacher.stopped",
    ]
    assert events[-1]["requests_total"] == NUM_REQUESTS


async def test_a_second_signal_ends_it_at_once(start_service: StartService) -> None:
    service = start_service("--max-batch-tokens", "400", module=SLOW)
    async with await ready_client(service) as client:
        tasks = score_many(client, NUM_REQUESTS)
        await until_taken(service, NUM_REQUESTS)
        service.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            while await client.ready():
                pass
        assert await asyncio.to_thread(service.end, signal.SIGINT) == 128 + signal.SIGINT
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)

    assert any(isinstance(outcome, TeacherUnavailable) for outcome in outcomes)


async def test_a_drain_that_takes_too_long_is_cut_off_with_exit_code_1(start_service: StartService) -> None:
    service = start_service("--max-batch-tokens", "400", "--grace-s", "0.001", module=SLOW)
    async with await ready_client(service) as client:
        tasks = score_many(client, NUM_REQUESTS)
        await until_taken(service, NUM_REQUESTS)
        assert await asyncio.to_thread(service.end, signal.SIGTERM) == 1
        await asyncio.gather(*tasks, return_exceptions=True)

    assert '"event": "teacher.cut_off"' in service.log


async def test_a_killed_service_is_unavailable_to_whoever_waits(start_service: StartService) -> None:
    service = start_service("--max-batch-tokens", "400", module=SLOW)
    async with await ready_client(service) as client:
        tasks = score_many(client, NUM_REQUESTS)
        await until_taken(service, NUM_REQUESTS)
        await asyncio.to_thread(service.end, signal.SIGKILL)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)

        assert all(isinstance(outcome, TeacherUnavailable) or hasattr(outcome, "top_ids") for outcome in outcomes)
        assert any(isinstance(outcome, TeacherUnavailable) for outcome in outcomes)
        assert not await client.ready()


def test_mistakes_end_with_exit_code_2_and_one_line(start_service: StartService, tmp_path: Path) -> None:
    empty_token = tmp_path / "token"
    empty_token.write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = {
            "has no config.json": start_service(model=tmp_path / "nowhere"),  # the only one that imports torch
            "the first line must be a token": start_service("--token-file", str(empty_token)),
            "is not there; write a token into its first line": start_service("--token-file", str(tmp_path / "nix")),
            "can be reached from other machines": start_service("--host", "0.0.0.0"),
            "--port-file": start_service("--port-file", str(tmp_path / "no" / "folder")),
            f"cannot listen on 127.0.0.1:{port}": start_service("--port", str(port)),
        }
        found = {message: service.process.wait(60) for message, service in cases.items()}

    assert set(found.values()) == {2}
    for message, service in cases.items():
        lines = [line for line in service.log.splitlines() if not line.startswith("{")]
        assert len(lines) == 1, service.log
        assert lines[0].startswith("teacher: ")
        assert message in lines[0]


async def test_the_real_model_answers_what_it_took_before_it_ends(service: Service, client: TeacherClient) -> None:
    """Last in this file: it ends the service that the others share."""
    scored_before = (await metrics(service))["teacher_scored_requests_total"]
    tasks = score_many(client, 12)
    await until_taken(service, 12, scored_before=scored_before)

    service.process.send_signal(signal.SIGTERM)

    assert len(await asyncio.gather(*tasks)) == 12
    assert await asyncio.to_thread(service.exit_code) == 0
