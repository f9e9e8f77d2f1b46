"""The stream of a status page: what a browser is sent, how often, and that a slow one costs nothing."""

from __future__ import annotations

import asyncio
import json
import socket
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from engine.http_port import HttpPort
from engine.monitor.feed import Feed
from engine.monitor.snapshot import SECTIONS
from engine.monitor.status_page import MAX_STREAMS, TURN_S
from engine.recipe import NodeConfig
from tests.engine.monitor.story import Log, demo
from tests.support.clock import ManualClock


class Node:
    """A port whose time moves when the test says so."""

    def __init__(self) -> None:
        self.feed = Feed()
        self.clock = ManualClock()
        self.http = HttpPort(
            NodeConfig(),
            is_ready=lambda: True,
            status=dict,
            metrics=lambda: b"",
            feed=self.feed,
            clock=self.clock,
        )
        self.url = ""

    def log(self, event: str, **fields: Any) -> None:
        self.feed.put(Log().line(event, **fields))

    async def turn(self) -> None:
        await self.clock.advance(TURN_S)


class Stream:
    """What a browser reads, message by message."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def message(self) -> str:
        async with asyncio.timeout(30):
            return (await self._response.content.readuntil(b"\n\n")).decode().removesuffix("\n\n")

    async def news(self) -> dict[str, Any]:
        kind, data = (await self.message()).split("\n", 1)
        assert kind == "event: state"
        news: dict[str, Any] = json.loads(data.removeprefix("data: "))
        return news

    async def end(self) -> bytes:
        async with asyncio.timeout(30):
            return await self._response.content.read()


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    node = Node()
    node.url = f"http://127.0.0.1:{await node.http.start()}"
    yield node
    await node.http.stop()


@pytest.fixture
async def browser() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


@asynccontextmanager
async def opened(browser: aiohttp.ClientSession, node: Node) -> AsyncIterator[Stream]:
    async with browser.get(f"{node.url}/events") as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        stream = Stream(response)
        assert await stream.message() == "retry: 2000"
        yield stream


async def test_first_everything_then_what_changed(node: Node, browser: aiohttp.ClientSession) -> None:
    for line in demo():
        node.feed.put(line)
    await node.turn()
    async with opened(browser, node) as stream:
        first = await stream.news()
        assert set(first) == set(SECTIONS)
        assert first["head"]["step"] == 12

        node.log("teacher.retried", request_id="x")
        await node.turn()
        news = await stream.news()
        assert news["teacher"]["retries"] == 1
        assert "curves" not in news


async def test_a_reload_needs_nothing_of_before(node: Node, browser: aiohttp.ClientSession) -> None:
    node.log("weights.live", version=7)
    await node.turn()
    for _ in range(2):
        async with opened(browser, node) as stream:
            assert (await stream.news())["weights"]["live"] == 7


async def test_however_much_happens_there_is_one_message_in_a_turn(node: Node, browser: aiohttp.ClientSession) -> None:
    async with opened(browser, node) as stream:
        await stream.news()
        for version in range(1, 500):
            node.log("weights.live", version=version)
        await node.turn()
        assert (await stream.news())["weights"]["live"] == 499
        node.log("weights.live", version=500)
        await node.turn()
        assert (await stream.news())["weights"]["live"] == 500


async def test_silence_is_broken_now_and_then_so_that_nobody_takes_it_for_the_end(
    node: Node, browser: aiohttp.ClientSession
) -> None:
    async with opened(browser, node) as stream:
        await stream.news()
        await node.clock.advance(9.5)
        node.log("weights.live", version=1)
        await node.turn()
        assert "weights" in await stream.news()
        await node.clock.advance(10.0)
        assert await stream.message() == ": still here"


async def test_one_browser_too_many_is_told_so(node: Node, browser: aiohttp.ClientSession) -> None:
    streams = [await browser.get(f"{node.url}/events") for _ in range(MAX_STREAMS)]
    async with browser.get(f"{node.url}/events") as refused:
        assert refused.status == 503
        assert refused.headers["Retry-After"] == "5"
        assert "16 pages of this run are open" in await refused.text()

    streams[0].close()
    node.log("weights.live", version=1)
    await node.turn()
    node.log("weights.live", version=2)  # who has gone is noticed when something is written
    await node.turn()
    async with opened(browser, node) as stream:
        assert (await stream.news())["weights"]["live"] == 2
    for each in streams:
        each.close()


async def test_the_last_message_is_how_it_ended(node: Node, browser: aiohttp.ClientSession) -> None:
    async with opened(browser, node) as stream:
        await stream.news()
        node.log("run.finished", step=3, stopped_by=None, wall_s=1.0)
        await node.http.stop()

        assert (await stream.news())["head"]["is_over"]
        assert await stream.message() == "event: end\ndata: {}"
        assert await stream.end() == b""


async def test_a_browser_that_does_not_read_is_sent_nothing_more_and_hung_up_on(node: Node) -> None:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)  # else the system may take all of it
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", int(node.url.rsplit(":", 1)[1])))
    reader, writer = await asyncio.open_connection(sock=connection, limit=1024)
    writer.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    answer = "x" * 3900
    for version in range(400):  # 20 kB a turn: more than all buffers on the way
        for prompt in range(5):
            node.log("eval.answer", version=version, prompt=f"{prompt}", answer=f"{version} {answer}", kl=0.1)
        await node.turn()
    sent_at_most = 400 * 20_000

    received = 0
    async with asyncio.timeout(30):
        try:
            while chunk := await reader.read(1 << 16):
                received += len(chunk)
        except ConnectionResetError:
            pass
    assert 0 < received < sent_at_most / 4
    writer.close()


async def test_a_page_that_fails_takes_nothing_else_along(
    node: Node, browser: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> bool:
        raise MemoryError("no more")

    async with opened(browser, node) as stream:
        await stream.news()
        monkeypatch.setattr(node.feed, "take_in", fail)
        await node.turn()
        assert await stream.message() == "event: end\ndata: {}"
    async with browser.get(f"{node.url}/events") as refused:
        assert refused.status == 503
        assert "no more" in await refused.text()
    async with browser.get(f"{node.url}/status") as status:
        assert status.status == 200


async def test_a_port_that_cannot_be_had_leaves_nothing_behind(node: Node) -> None:
    taken = Node()
    taken.http = HttpPort(
        NodeConfig(port=int(node.url.rsplit(":", 1)[1])),
        is_ready=lambda: True,
        status=dict,
        metrics=lambda: b"",
        feed=taken.feed,
        clock=taken.clock,
    )
    with pytest.raises(Exception, match="cannot be listened on"):
        await taken.http.start()
    assert taken.clock.num_sleeping == 0
    await taken.http.stop()


def test_the_files_of_the_page_are_installed_with_the_package() -> None:
    root = Path(__file__).resolve().parents[3]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["engine.monitor"]
    files = [path.relative_to(root / "engine/monitor") for path in (root / "engine/monitor/page").iterdir()]

    assert len(files) == 3
    assert [file for file in files if not any(fnmatchcase(str(file), pattern) for pattern in patterns)] == []
