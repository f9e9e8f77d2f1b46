"""Who may ask the node's port and what it says to a browser, and that nothing in a header brings it out of step."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine.clock import SystemClock
from engine.http_port import HttpPort
from engine.monitor.feed import Feed
from engine.recipe import NodeConfig

TOKEN = "sesame-0123456789abcdef"
PATHS = ("/", "/events", "/status", "/metrics")


def make_port(config: NodeConfig) -> HttpPort:
    return HttpPort(
        config,
        is_ready=lambda: True,
        status=lambda: {"step": 3},
        metrics=lambda: b"",
        feed=Feed(),
        clock=SystemClock(),
    )


@pytest.fixture
async def port(tmp_path: Path) -> AsyncIterator[int]:
    """Of a port that wants ``TOKEN``."""
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    served = make_port(NodeConfig(token_file=str(tmp_path / "token")))
    yield await served.start()
    await served.stop()


@pytest.fixture
async def open_port() -> AsyncIterator[int]:
    """Of a port without a token."""
    served = make_port(NodeConfig())
    yield await served.start()
    await served.stop()


class Answer:
    """Status, headers (names in lower case) and body."""

    def __init__(self, raw: bytes) -> None:
        head, _, self.body = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        self.status = int(first.split()[1])
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}


async def ask(port: int, path: str, *headers: bytes, host: bytes | None = b"a", method: str = "GET") -> Answer:
    """Over a bare socket: clients refuse to send what some of these headers hold. Of a stream, its beginning."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = [f"{method} {path} HTTP/1.1".encode(), b"Connection: close", *headers]
    if host is not None:
        lines.insert(1, b"Host: " + host)
    writer.write(b"\r\n".join(lines) + b"\r\n\r\n")
    raw = await reader.readuntil(b"\r\n\r\n")
    if b"text/event-stream" not in raw:
        raw += await reader.read()
    writer.close()
    await writer.wait_closed()
    return Answer(raw)


def bearer(token: str = TOKEN) -> bytes:
    return f"Authorization: Bearer {token}".encode()


@pytest.mark.parametrize(
    "headers",
    [
        (),
        (b"Authorization: Bearer \xff\xfe",),
        (b"Authorization: Bearer wrong",),
        (b"Authorization:",),
        (b"Cookie: node_1=x; " + TOKEN.encode(),),
    ],
)
async def test_without_the_token_nothing_is_told(port: int, headers: tuple[bytes, ...]) -> None:
    for path in PATHS:
        answer = await ask(port, path, *headers)
        assert answer.status == 401
        assert b"node.token_file" in answer.body
        assert answer.headers["www-authenticate"] == "Bearer"


async def test_with_the_token(port: int) -> None:
    answer = await ask(port, "/status", bearer())

    assert (answer.status, answer.body) == (200, b'{"step":3}')
    assert (await ask(port, "/", bearer())).status == 200
    assert (await ask(port, "/events", bearer())).status == 200


async def test_probes_need_no_token_and_no_name(port: int, open_port: int) -> None:
    assert (await ask(port, "/healthz", b"Authorization: \xff")).status == 200
    assert (await ask(port, "/readyz")).status == 200
    assert (await ask(open_port, "/healthz", host=b"10.1.2.3:80")).status == 200


async def test_a_token_in_the_address_becomes_a_cookie_and_leaves_the_address(port: int) -> None:
    answer = await ask(port, f"/?token={TOKEN}")

    assert answer.status == 303
    assert answer.headers["location"] == "./"
    cookie, *attributes = answer.headers["set-cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(attributes)
    assert TOKEN not in answer.headers["set-cookie"]
    for path in PATHS:
        assert (await ask(port, path, b"Cookie: " + cookie.encode())).status == 200
    again = await ask(port, "/?token=old", b"Cookie: " + cookie.encode())
    assert (again.status, again.headers["location"]) == (303, "./")


async def test_the_cookie_of_one_port_is_not_that_of_another(tmp_path: Path, port: int) -> None:
    (tmp_path / "other").write_text("another-token\n")
    other = make_port(NodeConfig(token_file=str(tmp_path / "other")))
    other_port = await other.start()
    mine, theirs = [
        (await ask(at, f"/?token={token}")).headers["set-cookie"].split("; ")[0]
        for at, token in ((port, TOKEN), (other_port, "another-token"))
    ]
    both = f"Cookie: {mine}; {theirs}".encode()

    assert (await ask(port, "/status", both)).status == 200
    assert (await ask(other_port, "/status", both)).status == 200
    await other.stop()


@pytest.mark.parametrize("query", ["", "token=", "token=wrong", "token=%00%ff", "token=a&token=b"])
async def test_a_wrong_token_in_the_address_gets_nothing(port: int, query: str) -> None:
    answer = await ask(port, f"/?{query}")

    assert answer.status == 401
    assert "set-cookie" not in answer.headers
    assert b"wrong" not in answer.body


async def test_the_token_is_taken_from_the_address_of_the_page_alone(port: int) -> None:
    for path in PATHS[1:]:
        assert (await ask(port, f"{path}?token={TOKEN}")).status == 401


@pytest.mark.parametrize("host", [b"evil.example", b"127.0.0.1.evil.example:80", b"10.0.0.1", b"", None])
async def test_without_a_token_the_port_is_asked_as_this_machine_only(open_port: int, host: bytes | None) -> None:
    for path in PATHS:
        assert (await ask(open_port, path, host=host)).status in (400, 403)


@pytest.mark.parametrize("host", [b"localhost", b"127.0.0.1:9", b"[::1]:7"])
async def test_without_a_token_this_machine_may_read(open_port: int, host: bytes) -> None:
    for path in PATHS:
        assert (await ask(open_port, path, host=host)).status == 200


async def test_pages_of_other_origins_may_not_read(port: int, open_port: int) -> None:
    for path in PATHS:
        for origin in (b"https://evil.example", b"null"):
            assert (await ask(open_port, path, b"Origin: " + origin, host=b"localhost")).status == 403
            assert (await ask(port, path, bearer(), b"Origin: " + origin)).status == 403
    own = await ask(open_port, "/status", b"Origin: http://localhost:80", host=b"localhost:80")
    assert own.status == 200
    assert not [name for name in own.headers if name.startswith("access-control")]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
async def test_nothing_but_reading_is_possible(open_port: int, method: str) -> None:
    for path in PATHS:
        answer = await ask(open_port, path, b"Content-Length: 0", host=b"localhost", method=method)
        assert answer.status == 405


async def test_every_answer_forbids_what_a_browser_might_do_with_it(port: int, open_port: int) -> None:
    answers = [
        await ask(open_port, "/", host=b"localhost"),
        await ask(open_port, "/events", host=b"localhost"),
        await ask(open_port, "/status", host=b"localhost"),
        await ask(open_port, "/nothing", host=b"localhost"),
        await ask(open_port, "/", host=b"evil.example"),
        await ask(port, "/"),
        await ask(port, f"/?token={TOKEN}"),
    ]
    for answer in answers:
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


async def test_the_page_is_one_document_that_may_run_its_own_script_and_nothing_else(open_port: int) -> None:
    answer = await ask(open_port, "/", host=b"localhost")
    policy = answer.headers["content-security-policy"]
    html = answer.body.decode()

    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
        assert len(content) > 1000
    assert not re.search(r"(src|href|action|url)\s*[=(]\s*[\"']?\s*(https?:)?//", html), "nothing from elsewhere"
    assert not re.search(r"\son[a-z]+=|style=|innerHTML|insertAdjacentHTML|document\.write|eval\(", html)
