"""Who may ask the node's port, and that nothing in a header brings it out of step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine.http_port import HttpPort
from engine.recipe import NodeConfig

TOKEN = "sesame-0123456789abcdef"


@pytest.fixture
async def port(tmp_path: Path) -> AsyncIterator[int]:
    """Of a port that wants ``TOKEN``."""
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    config = NodeConfig(token_file=str(tmp_path / "token"))
    served = HttpPort(config, is_ready=lambda: True, status=lambda: {"step": 3}, metrics=lambda: b"")
    yield await served.start()
    await served.stop()


async def ask(port: int, path: str, *headers: bytes) -> tuple[int, bytes]:
    """Status and body. Over a bare socket: clients refuse to send what some of these headers hold."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = (f"GET {path} HTTP/1.1".encode(), b"Host: a", b"Connection: close", *headers)
    writer.write(b"\r\n".join(lines) + b"\r\n\r\n")
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


@pytest.mark.parametrize(
    "headers",
    [(), (b"Authorization: Bearer \xff\xfe",), (b"Authorization: Bearer wrong",), (b"Authorization:",)],
)
async def test_without_the_token_nothing_is_told(port: int, headers: tuple[bytes, ...]) -> None:
    for path in ("/status", "/metrics"):
        status, body = await ask(port, path, *headers)
        assert status == 401
        assert b"node.token_file" in body


async def test_with_the_token(port: int) -> None:
    assert await ask(port, "/status", f"Authorization: Bearer {TOKEN}".encode()) == (200, b'{"step":3}')


async def test_probes_need_no_token(port: int) -> None:
    assert (await ask(port, "/healthz", b"Authorization: \xff"))[0] == 200
    assert (await ask(port, "/readyz"))[0] == 200
