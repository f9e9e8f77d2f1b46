"""The status page in a real browser, in front of made-up runs: those that one would have to wait long for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from engine.clock import SystemClock
from engine.http_port import HttpPort
from engine.monitor.feed import Feed
from engine.monitor.status_page import MAX_STREAMS
from engine.recipe import NodeConfig
from tests.engine.monitor.story import Log, demo
from tests.engine.monitor.test_snapshot import trained_answer
from tests.support.browser import Page, browser, needs_chromium

pytestmark = needs_chromium()

PHONE, DESK = (390, 844), (1280, 900)
HTML = "<img src=x onerror=alert(1)>"


class Shown:
    """A page, and the port that it is from."""

    def __init__(self, port: HttpPort, feed: Feed, page: Page, url: str) -> None:
        self.port = port
        self.feed = feed
        self.page = page
        self.url = url

    def log(self, lines: Any) -> None:
        for line in lines:
            self.feed.put(line)

    async def texts(self, selector: str) -> list[str]:
        found: list[str] = await self.page.evaluate(
            f"[...document.querySelectorAll('{selector}')].map((e) => e.innerText)"
        )
        return found

    async def assert_fits(self) -> None:
        """On a phone and on a desk, by day and by night; and the browser complains about nothing."""
        for (width, height), dark in ((PHONE, True), (DESK, False), (PHONE, False)):
            await self.page.look(width=width, height=height, dark=dark)
            await self.page.until(f"drawnWidth < {width}")
            assert await self.page.sticks_out() == []
        assert self.page.errors == []
        assert await self.page.evaluate("document.querySelectorAll('img').length") == 0


@pytest.fixture
async def shown(tmp_path: Path) -> AsyncIterator[Shown]:
    feed = Feed()
    port = HttpPort(
        NodeConfig(),
        is_ready=lambda: True,
        status=dict,
        metrics=lambda: b"",
        feed=feed,
        clock=SystemClock(),
    )
    url = f"http://127.0.0.1:{await port.start()}/"
    async with browser(tmp_path / "profile") as chromium:
        page = await chromium.open(url, width=PHONE[0], height=PHONE[1])
        await page.until("document.body.dataset.link === 'live'")
        yield Shown(port, feed, page, url)
    await port.stop()


async def test_a_run_of_which_nothing_is_known_yet(shown: Shown) -> None:
    page = shown.page

    assert await page.text("#phase") == "starting"
    assert await page.text("#step") == "0"
    for chart in ("kl-chart", "speed-chart", "stale-chart"):
        assert await page.text(f"#{chart}") == "after the first step"
    assert await page.text("#answers-none") == "after the first step"
    assert "not measured yet" in await page.text("#kl-note")
    assert await page.text("#replicas") == "not asked yet"
    assert await page.evaluate("document.querySelector('#held-out').hidden")
    await shown.assert_fits()


async def test_the_demo_with_eight_replicas_of_which_two_are_away(shown: Shown) -> None:
    log = Log()
    for index in range(8):
        log.line("teacher.replica_changed", replica=f"http://teacher-{index}.cluster:8765", state="closed", reason="")
    for index in (2, 5):
        log.line("teacher.replica_changed", replica=f"http://teacher-{index}.cluster:8765", state="open", reason=HTML)
    shown.log([*demo(), *log.lines])
    page = shown.page
    await page.until("document.querySelectorAll('#replicas li').length === 9")

    assert "7 of 9 replicas up" in await page.text("#teacher-figures")
    away = await shown.texts("#replicas [data-state=open]")
    assert len(away) == 2
    assert "away since" in away[0]
    assert HTML in away[0]
    assert await page.text("#link") == "live"
    assert (await page.text("#step"), await page.text("#steps")) == ("12", " of 30")
    assert "1.331 held-out" in await page.text("#kl-figures")
    assert "0.625 mean" in await page.text("#stale-figures")
    assert await page.text("[data-actor=sampler] .what") == "86% busy, waits for prompt_feeder"
    assert await page.text("[data-channel=prompts] .fill") == "1 / 2"
    assert await page.text("#answers-none") == "this trainer does not say what single tokens cost"
    assert "Why is the sky blue?" in await page.text("#held-answers")
    await shown.assert_fits()


async def test_a_run_that_failed_says_so_and_stays_to_be_seen(shown: Shown) -> None:
    log = Log()
    log.at(500).line("run.failed", level="error", failed_actor="learner", cause=HTML, step=13)
    shown.log([*demo(), *log.lines])
    await shown.page.until("document.querySelector('#phase').innerText === 'failed'")
    await shown.port.stop()
    await shown.page.until("document.body.dataset.link === 'over'")

    assert "--resume" in await shown.page.text("#notice")
    assert HTML in await shown.page.text("#log")
    assert await shown.page.text("#step") == "12"


async def test_a_huge_run_with_names_that_nobody_foresaw(shown: Shown) -> None:
    log = Log()
    log.started(steps=1_000_000, per_step=4096, max_staleness=64)
    names = [f"{HTML}_{'long' * 12}_{index}" for index in range(14)]
    log.line(
        "run.graph",
        actors=[
            {"name": name, "consumes": f"c{i}" if i else None, "produces": f"c{i + 1}" if i < 13 else None}
            for i, name in enumerate(names)
        ],
    )
    log.line("rollout.dispatched", rollout_id=0)
    for name in names:
        log.line("actor.state_changed", actor=name, before="new", after="running")
    for i in range(13):
        log.channel(f"c{i + 1}", 8192, 8192, 0.0, 0.0)
    for step in range(1, 1200):
        loss = None if step % 7 == 0 else 1e6 / step
        log.at(float(step)).step(step * 800, loss=loss, ages=(step % 65,), num_rollouts=4096)
    log.line(
        "answer.trained",
        **trained_answer(
            959_200,
            prompt="word" * 900,
            pieces=[HTML, "\n", "", "\u202eright to left", *["unbrokenword" * 3] * 508],
            divergences=[float("nan"), -0.5, 12.0, 1e9, *[0.3] * 508],
            student_logprobs=[None] * 512,
            teacher_logprobs=[-1.0] * 512,
            num_tokens=9000,
        ),
    )
    log.line("log.message", level="warning", logger="x" * 300, message="y" * 5000)
    shown.log(log.lines)
    page = shown.page
    await page.until("document.querySelectorAll('.tokens > span').length > 500")

    assert await page.text("#step") == "959,200"
    assert (await shown.texts(".actor .name"))[13] == names[13]
    assert (await shown.texts(".channel .fill"))[0] == "8,192 / 8,192"
    assert "8,488 tokens more" in await page.text("#answers")
    assert "64 allowed" in await page.text("#stale-figures")
    await page.point_at(".tokens > span:first-child")
    assert "KL not finite" in (await page.text(".told")).replace("loss", "KL")
    await shown.assert_fits()


async def test_when_too_many_are_looking_the_page_says_why_it_is_empty(shown: Shown) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        others = [await session.get(f"{shown.url}events") for _ in range(MAX_STREAMS - 1)]
        await shown.page.evaluate("connection.source.dispatchEvent(new Event('error'))")
        others.append(await session.get(f"{shown.url}events"))
        async with asyncio.timeout(60):
            while others[-1].status == 503:  # until it is noticed that the page gave up its stream
                others[-1] = await session.get(f"{shown.url}events")
        await shown.page.until("document.querySelector('#notice').innerText.includes('16 pages of this run are open')")
        for each in others:
            each.close()
    await shown.page.until("document.body.dataset.link === 'live'")
    assert await shown.page.evaluate("document.querySelector('#notice').hidden")
