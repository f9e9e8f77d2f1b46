"""The service's door and its edges, in process with a fake model, and the client's view of good and bad services."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import msgspec
import numpy as np
import pytest

from engine.errors import TeacherOverloaded, TeacherRefused, TeacherUnavailable, UserError
from teacher import wire
from teacher.batcher import Batcher
from teacher.client import TeacherClient
from teacher.protocol import PROTOCOL, score_request
from teacher.server import TeacherServer, check_exposure
from teacher.token import is_authorized, read_token
from tests.teacher.test_batcher import INFO, HeldBackend
from tests.teacher.test_wire import make_scores

ASK = {"prompt_ids": [1], "response_ids": [2, 3], "top_k": 1}
FRAME = wire.encode_request(score_request(prompt_ids=[1], response_ids=[2, 3], top_k=1), values="float32")


class Rig:
    """A server on a real port over a ``HeldBackend``."""

    def __init__(self, *, max_queue: int, token: str | None, body_timeout_s: float) -> None:
        self.backend = HeldBackend()
        self.batcher = Batcher(backend=self.backend, max_batch_tokens=100, max_queue=max_queue, linger_s=0.0)
        self.server = TeacherServer(
            batcher=self.batcher,
            token=token,
            max_request_bytes=1000,
            max_queue=max_queue,
            body_timeout_s=body_timeout_s,
        )
        self.http = aiohttp.ClientSession()
        self.url = ""

    async def open(self) -> None:
        self.url = f"http://127.0.0.1:{await self.server.start(host='127.0.0.1', port=0)}"

    async def close(self) -> None:
        self.backend.let_answer(100)
        await self.http.close()
        await self.server.stop()
        await self.batcher.stop()

    async def post(self, body: bytes, **headers: str) -> tuple[int, str]:
        """Status and reason."""
        async with self.http.post(self.url + "/v1/score", data=body, headers=headers) as response:
            raw = await response.read()
            return response.status, msgspec.json.decode(
                raw, type=wire.ErrorAnswer
            ).error if response.status > 200 else ""

    async def metric(self, name: str) -> float:
        async with self.http.get(self.url + "/metrics") as response:
            lines = (await response.text()).splitlines()
        return float(next(line for line in lines if line.startswith(name)).split()[-1])


StartRig = Callable[..., Awaitable[Rig]]


@pytest.fixture
async def start_rig() -> AsyncIterator[StartRig]:
    rigs: list[Rig] = []

    async def start(
        *, max_queue: int = 4, token: str | None = None, load: bool = True, body_timeout_s: float = 30.0
    ) -> Rig:
        rig = Rig(max_queue=max_queue, token=token, body_timeout_s=body_timeout_s)
        rigs.append(rig)
        await rig.open()
        if load:
            await rig.batcher.start()
        return rig

    yield start
    for rig in rigs:
        await rig.close()


async def until(claim: Callable[[], bool]) -> None:
    """Sockets show nothing that could be waited for; ten seconds are far beyond what a turn of them takes."""
    async with asyncio.timeout(10):
        while not claim():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_the_client_is_given_what_the_model_said(start_rig: StartRig) -> None:
    rig = await start_rig()
    rig.backend.let_answer()

    async with TeacherClient(rig.url, values="float32") as client:
        scores = await client.score(prompt_ids=[1], response_ids=[2, 3], top_k=1)

        assert await client.info() == INFO
        assert await client.ready()
    assert scores.sampled_logprobs.tolist() == [-1, -1]
    assert scores.top_ids.tolist() == [[0], [0]]


async def test_ready_comes_with_the_model_and_goes_with_the_drain_and_health_stays(start_rig: StartRig) -> None:
    rig = await start_rig(load=False)

    async def statuses() -> list[int]:
        found = []
        for path in ("/healthz", "/readyz", "/v1/info"):
            async with rig.http.get(rig.url + path) as response:
                found.append(response.status)
        return found

    assert await statuses() == [200, 503, 503]
    await rig.batcher.start()
    assert await statuses() == [200, 200, 200]
    await rig.batcher.drain()
    assert await statuses() == [200, 503, 200]
    assert (await rig.post(FRAME)) == (503, "the teacher is shutting down")


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", "Bearer secre", "Bearer secret2", "Basic secret"]
)
async def test_without_the_token_only_health_is_answered(header: str | None, start_rig: StartRig) -> None:
    rig = await start_rig(token="secret")
    headers = {} if header is None else {"Authorization": header}

    for path, expected in (("/healthz", 200), ("/readyz", 200), ("/v1/info", 401), ("/metrics", 401), ("/nix", 401)):
        async with rig.http.get(rig.url + path, headers=headers) as response:
            assert response.status == expected
    assert (await rig.post(b"x", **headers))[0] == 401


async def test_the_client_sends_its_token_and_names_the_file_when_it_is_not_accepted(
    start_rig: StartRig, tmp_path: Path
) -> None:
    rig = await start_rig(token="secret")
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.write_text("secret\nnot this line\n")
    wrong.write_text("guess\n")

    async with TeacherClient(rig.url, token_file=str(right)) as client:
        assert await client.info() == INFO
    async with TeacherClient(rig.url, token="secret") as client:
        assert await client.info() == INFO
    async with TeacherClient(rig.url, token_file=str(wrong)) as client:
        with pytest.raises(
            TeacherRefused, match=r"answered 401.*first line of '.*wrong'; does the service read"
        ) as caught:
            await client.info()
        assert caught.value.status == 401
    async with TeacherClient(rig.url) as client:
        with pytest.raises(TeacherRefused, match=r"no token was sent"):
            await client.score(prompt_ids=[1], response_ids=[2], top_k=1)


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 400, "0 bytes are too few"),
        (b"GET / HTTP/1.1", 400, "begins with b'TWF1'"),
        (b"\x80\x04\x95" * 50, 400, "begins with b'TWF1'"),
        (FRAME[:-1], 400, "there are"),
        (FRAME + b"\0", 400, "there are"),
        (b"\0" * 1001, 413, "larger than 1000 bytes"),
        (FRAME[:-2] + b"\xff\xff", 422, "vocabulary ends at 999"),
    ],
)
async def test_a_bad_body_has_its_status_and_the_next_request_is_answered(
    body: bytes, status: int, reason: str, start_rig: StartRig
) -> None:
    rig = await start_rig()
    rig.backend.let_answer()

    got = await rig.post(body)

    assert got[0] == status
    assert reason in got[1]
    assert (await rig.post(FRAME))[0] == 200


async def test_a_chunked_body_over_the_limit_is_refused(start_rig: StartRig) -> None:
    rig = await start_rig()

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"\0" * 100

    async with rig.http.post(rig.url + "/v1/score", data=endless()) as response:
        assert response.status == 413


async def test_a_body_is_not_decompressed(start_rig: StartRig) -> None:
    rig = await start_rig()
    status, reason = await rig.post(zlib.compress(b"\0" * 100_000), **{"Content-Encoding": "deflate"})

    assert status == 400
    assert "begins with" in reason


async def test_a_body_that_does_not_arrive_is_given_up(start_rig: StartRig) -> None:
    rig = await start_rig(body_timeout_s=0.05)
    never = asyncio.Event()

    async def stalled() -> AsyncIterator[bytes]:
        yield b"TWF1"
        await never.wait()

    async with rig.http.post(rig.url + "/v1/score", data=stalled()) as response:
        assert response.status == 408


@pytest.mark.parametrize("head", [b"", b"POST /v1/score HTTP/1.1\r\nHost: x\r\nX: "])
async def test_a_connection_that_never_asks_anything_is_closed(start_rig: StartRig, head: bytes) -> None:
    rig = await start_rig(body_timeout_s=0.05)
    host, port = rig.url.removeprefix("http://").split(":")
    async with rig.http.get(rig.url + "/healthz") as response:
        assert response.status == 200

    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(head)

    async with asyncio.timeout(10):
        assert await reader.read() == b""
    writer.close()
    # One that has asked is kept.
    async with rig.http.get(rig.url + "/healthz") as response:
        assert response.status == 200


async def test_unknown_paths_and_methods_are_refused(start_rig: StartRig) -> None:
    rig = await start_rig()

    async with rig.http.get(rig.url + "/nix") as response:
        assert response.status == 404
    async with rig.http.get(rig.url + "/v1/score") as response:
        assert response.status == 405


async def test_an_overloaded_teacher_says_when_to_come_back(start_rig: StartRig) -> None:
    rig = await start_rig(max_queue=1)
    client = TeacherClient(rig.url)
    tasks = [asyncio.create_task(client.score(prompt_ids=[1], response_ids=[2], top_k=1))]
    await until(lambda: rig.batcher.statistics().computing == 1)
    tasks.append(asyncio.create_task(client.score(prompt_ids=[1], response_ids=[3], top_k=1)))
    await until(lambda: rig.batcher.statistics().waiting == 1)

    with pytest.raises(TeacherOverloaded, match="answered 429: 1 requests are waiting") as caught:
        await client.score(prompt_ids=[1], response_ids=[4], top_k=1)
    assert caught.value.retry_after_s == 0.1
    async with rig.http.post(rig.url + "/v1/score", data=FRAME) as response:
        assert (response.status, response.headers["Retry-After"]) == (429, "1")

    rig.backend.let_answer(2)
    await asyncio.gather(*tasks)
    await client.close()


async def test_a_client_that_hangs_up_leaves_the_queue(start_rig: StartRig) -> None:
    rig = await start_rig()
    client = TeacherClient(rig.url)
    first = asyncio.create_task(client.score(prompt_ids=[1], response_ids=[2], top_k=1))
    await until(lambda: rig.batcher.statistics().computing == 1)
    gone = asyncio.create_task(client.score(prompt_ids=[1], response_ids=[3], top_k=1))
    await until(lambda: rig.batcher.statistics().waiting == 1)
    gone.cancel()
    await until(lambda: rig.batcher.statistics().withdrawn_total == 1)
    rig.backend.let_answer(2)
    await first

    assert rig.backend.batches == [[2]]
    await client.close()


async def test_a_failing_model_is_503_and_a_broken_teacher_500(
    start_rig: StartRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = await start_rig()
    rig.backend.failure = RuntimeError("boom")
    rig.backend.let_answer()
    assert await rig.post(FRAME) == (503, "the model failed on this batch: RuntimeError: boom")

    async with TeacherClient(rig.url) as client:
        rig.backend.let_answer()
        with pytest.raises(TeacherUnavailable, match="answered 503"):
            await client.score(prompt_ids=[1], response_ids=[2], top_k=1)

        def broken(*_: object, **__: object) -> bytes:
            raise KeyError("nobody thought of this")

        monkeypatch.setattr(wire, "encode_answer", broken)
        rig.backend.failure = None
        rig.backend.let_answer()
        with pytest.raises(TeacherUnavailable, match="answered 500: KeyError in the teacher; its log says where"):
            await client.score(prompt_ids=[1], response_ids=[2], top_k=1)


async def test_metrics_count_requests_bytes_and_tokens(start_rig: StartRig) -> None:
    rig = await start_rig()
    rig.backend.let_answer()
    assert (await rig.post(FRAME))[0] == 200
    await rig.post(b"junk")

    assert await rig.metric('teacher_requests_total{path="/v1/score",status="200"}') == 1
    assert await rig.metric('teacher_requests_total{path="/v1/score",status="400"}') == 1
    assert await rig.metric("teacher_received_bytes_total") == len(FRAME) + 4
    assert await rig.metric("teacher_sent_bytes_total") > 0
    assert await rig.metric("teacher_scored_requests_total") == 1
    assert await rig.metric("teacher_packed_tokens_total") == 2
    assert await rig.metric("teacher_waiting_requests") == 0
    assert await rig.metric("teacher_score_seconds_count") == 2


async def test_a_port_that_is_taken_is_a_clear_error(start_rig: StartRig) -> None:
    rig = await start_rig(load=False)
    port = int(rig.url.rpartition(":")[2])
    batcher = Batcher(backend=HeldBackend(), max_batch_tokens=1, max_queue=1)
    second = TeacherServer(batcher=batcher, token=None, max_request_bytes=1, max_queue=1)

    with pytest.raises(UserError, match=rf"cannot listen on 127.0.0.1:{port}: .*in use.*choose another --port"):
        await second.start(host="127.0.0.1", port=port)
    await batcher.stop()


@pytest.mark.parametrize(
    ("host", "has_token", "is_open", "is_fine"),
    [
        ("127.0.0.1", False, False, True),
        ("localhost", False, False, True),
        ("::1", False, False, True),
        ("0.0.0.0", False, False, False),
        ("::", False, False, False),
        ("teacher.example", False, False, False),
        ("0.0.0.0", True, False, True),
        ("0.0.0.0", False, True, True),
    ],
)
def test_other_machines_need_a_token_or_a_word(host: str, has_token: bool, is_open: bool, is_fine: bool) -> None:
    if is_fine:
        check_exposure(host, has_token=has_token, is_open=is_open)
        return
    with pytest.raises(UserError, match=r"can be reached from other machines and there is no --token-file"):
        check_exposure(host, has_token=has_token, is_open=is_open)


@pytest.mark.parametrize("text", [b"", b"\nsecond", b"two words", b"caf\xc3\xa9", b"a\0b"])
def test_a_token_file_without_a_usable_first_line_is_refused(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes(text)

    with pytest.raises(UserError, match="the first line must be a token"):
        read_token(str(path))


def test_a_token_is_the_first_line_without_space_around_it(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes(b"  abc-123 \r\nmore\n")

    assert read_token(str(path)) == "abc-123"
    with pytest.raises(UserError, match="is not there; write a token into its first line"):
        read_token(str(tmp_path / "nix"))


def test_authorization_is_an_exact_match() -> None:
    assert is_authorized(None, None)
    assert is_authorized("Bearer abc", "abc")
    assert not any(is_authorized(header, "abc") for header in (None, "abc", "bearer abc", "Bearer abcd", "Bearer é"))


# Services that are none


Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
async def fake_service() -> AsyncIterator[Callable[[bytes], Awaitable[str]]]:
    """``await fake_service(raw_http_answer)`` gives the url of a server that says just that, then hangs up."""
    servers: list[asyncio.Server] = []

    async def start(answer: bytes) -> str:
        async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            writer.write(answer)
            await writer.drain()
            writer.close()

        servers.append(await asyncio.start_server(on_connection, "127.0.0.1", 0))
        return f"http://127.0.0.1:{servers[-1].sockets[0].getsockname()[1]}"

    yield start
    for server in servers:
        server.close()
        await server.wait_closed()


def http(body: bytes, *, status: str = "200 OK", length: int | None = None, headers: str = "") -> bytes:
    length = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\n{headers}\r\n".encode() + body


def answer_frame(*, num_response: int = 2, top_k: int = 1, num_extra: int | None = None) -> bytes:
    scores = make_scores(num_response=num_response, top_k=top_k, num_extra=num_extra)
    return wire.encode_answer(scores, values="float16", vocab_size=100)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "/v1/score: "),
        (b"\x00\x01garbage\r\n\r\n", "/v1/score: "),
        (http(b"hello"), "malformed answer: 5 bytes are too few"),
        (http(answer_frame(), length=len(answer_frame()) + 10), "/v1/score: "),
        (http(answer_frame(num_response=3)), r"the answer has top-k and extra values of shapes"),
        (http(answer_frame(num_extra=1)), r"the request asked for"),
        (http(b"\0" * 5000), "longer than the"),
        (http(b"<html>bad gateway</html>", status="502 Bad Gateway"), "answered 502: <html>bad gateway"),
        (http(b"", status="500 Oops"), "answered 500: no reason given"),
        (http(b"", status="408 Slow"), "answered 408"),
        (http(b"", status="302 Found", headers="Location: http://127.0.0.1:1/\r\n"), "answered 302"),
    ],
)
async def test_an_answer_that_is_none_is_a_failed_attempt(
    raw: bytes, message: str, fake_service: Callable[[bytes], Awaitable[str]]
) -> None:
    async with TeacherClient(await fake_service(raw)) as client:
        with pytest.raises(TeacherUnavailable, match=message):
            await client.score(prompt_ids=[1], response_ids=[2, 3], top_k=1)


@pytest.mark.parametrize(
    ("raw", "seconds"),
    [
        (http(b"", status="429 Busy", headers="Retry-After: 7\r\n"), 7.0),
        (http(b"", status="429 Busy", headers="Retry-After: tomorrow\r\n"), 1.0),
        (http(b"", status="429 Busy", headers="Retry-After: 1e300\r\n"), 600.0),
        (http(b'{"error": "full", "retry_after_s": -3}', status="429 Busy"), 0.0),
        (http(b'{"error": "full", "retry_after_s": 0.25}', status="429 Busy", headers="Retry-After: 7\r\n"), 0.25),
    ],
)
async def test_retry_after_is_taken_from_body_or_header(
    raw: bytes, seconds: float, fake_service: Callable[[bytes], Awaitable[str]]
) -> None:
    async with TeacherClient(await fake_service(raw)) as client:
        with pytest.raises(TeacherOverloaded) as caught:
            await client.score(prompt_ids=[1], response_ids=[2, 3], top_k=1)
    assert caught.value.retry_after_s == seconds


async def test_a_service_of_another_protocol_is_refused(fake_service: Callable[[bytes], Awaitable[str]]) -> None:
    other = msgspec.json.encode(msgspec.structs.replace(INFO, protocol=PROTOCOL + 1))

    async with TeacherClient(await fake_service(http(other))) as client:
        with pytest.raises(TeacherRefused, match=r"speaks protocol 2, this client speaks 1; upgrade the older side"):
            await client.info()


async def test_information_that_is_none_is_a_failed_attempt(fake_service: Callable[[bytes], Awaitable[str]]) -> None:
    async with TeacherClient(await fake_service(http(b"{}"))) as client:
        with pytest.raises(TeacherUnavailable, match="not the answer of a teacher"):
            await client.info()


async def test_nobody_listening_is_unavailable_and_not_ready(unused_tcp_port: int) -> None:
    async with TeacherClient(f"http://127.0.0.1:{unused_tcp_port}/") as client:
        assert not await client.ready()
        with pytest.raises(TeacherUnavailable, match=f"127.0.0.1:{unused_tcp_port}/v1/info"):
            await client.info()


async def test_a_service_that_does_not_answer_in_time_is_unavailable(start_rig: StartRig) -> None:
    rig = await start_rig()

    async with TeacherClient(rig.url, timeout_s=0.05) as client:
        with pytest.raises(TeacherUnavailable, match=r"no answer within 0.05 s"):
            await client.score(prompt_ids=[1], response_ids=[2], top_k=1)


async def test_closing_the_client_ends_its_open_calls(start_rig: StartRig) -> None:
    rig = await start_rig()
    client = TeacherClient(rig.url)
    waiting = asyncio.create_task(client.score(prompt_ids=[1], response_ids=[2], top_k=1))
    await until(lambda: rig.batcher.statistics().computing == 1)

    await client.close()
    await client.close()

    with pytest.raises(TeacherUnavailable):
        await waiting


@pytest.mark.parametrize("url", ["", "127.0.0.1:8900", "ftp://host", "http://"])
def test_what_is_no_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(UserError, match=r"is not one; expected for example http://127.0.0.1:8900"):
        TeacherClient(url)


async def test_values_are_packed_as_the_client_asked(start_rig: StartRig) -> None:
    rig = await start_rig()
    rig.backend.let_answer(2)
    sizes = []
    for values in ("float16", "float32"):
        before = await rig.metric("teacher_sent_bytes_total")
        async with TeacherClient(rig.url, values=values) as client:
            scores = await client.score(prompt_ids=[1], response_ids=[2, 3], top_k=1)
        assert scores.sampled_logprobs.dtype == np.float32
        sizes.append(await rig.metric("teacher_sent_bytes_total") - before)

    assert sizes[1] - sizes[0] == 2 * 2 * 2
