"""The status page in a real browser, in front of real runs: while they train, when they end, when they are killed."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.runs import World, events, finish, free_port, start_run, stop, wait_for
from tests.support.browser import Browser, Page, browser, needs_chromium

pytestmark = [needs_chromium(), pytest.mark.slow]

PHONE, DESK = (390, 844), (1280, 900)
FOREVER = ("--set", "steps=100000", "--json")


@pytest.fixture
async def chromium(tmp_path: Path) -> AsyncIterator[Browser]:
    async with browser(tmp_path / "profile") as found:
        yield found


@contextmanager
def running(recipe: Path, out: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A run that has done three steps."""
    process = start_run(recipe, "--out", str(out), *FOREVER, *arguments)
    try:
        wait_for(out, "learner.step", process=process, count=3)
        assert process.poll() is None, finish(process).stderr[-4000:]
        yield process
    finally:
        process.kill()
        assert process.stdout is not None
        if not process.stdout.closed:
            finish(process)


def address(out: Path) -> str:
    return f"http://127.0.0.1:{json.loads((out / 'node.json').read_text())['port']}/"


async def assert_tokens_tell_what_they_cost(page: Page) -> None:
    """By mouse and by keyboard."""
    first = "#answers article:first-child"
    # What is pointed at must not be moved down by the next step's answer.
    await page.evaluate("DRAW.answers = () => {}")
    shades = await page.evaluate(
        f"[...document.querySelectorAll('{first} .tokens > span')]"
        ".map((e) => Number(e.style.getPropertyValue('--heat')))"
    )
    assert max(shades) > 0
    assert all(0 <= shade <= 1 for shade in shades)

    await page.point_at(f"{first} .tokens > span")
    told = await page.text(f"{first} .told")
    assert "KL " in told
    assert "log p: student -" in told
    assert "token 1 of" in told
    await page.evaluate(f"document.querySelector('{first} .tokens').focus()")
    await page.key("ArrowRight")
    if len(shades) > 1:
        assert "token 2 of" in await page.text(f"{first} .told")


async def test_a_run_while_it_trains_on_a_phone_and_on_a_desk_by_day_and_by_night(
    world: World, tmp_path: Path, chromium: Browser
) -> None:
    out = tmp_path / "out"
    with running(world.recipe(tmp_path / "r.py"), out) as process:
        url = address(out)
        for (width, height), dark in ((PHONE, False), (PHONE, True), (DESK, False), (DESK, True)):
            page = await chromium.open(url, width=width, height=height, dark=dark)
            await page.until("document.querySelectorAll('article .tokens').length > 1")
            step = int((await page.text("#step")).replace(",", ""))
            await page.until(f"Number(document.querySelector('#step').innerText.replace(',', '')) > {step} + 2")

            assert await page.text("#run") == "tiny"
            assert await page.text("#phase") == "training"
            assert await page.text("#link") == "live"
            assert await page.evaluate("[...document.querySelectorAll('.actor .name')].map((e) => e.innerText)") == [
                "prompt_feeder",
                "sampler",
                "teacher_proxy",
                "learner",
                "weight_syncer",
            ]
            await page.until("/^\\d+% busy/.test(document.querySelector('[data-actor=learner] .what').innerText)")
            await page.until("/^\\d+ \\/ 8$/.test(document.querySelector('[data-channel=scored] .fill').innerText)")
            assert (
                await page.evaluate("document.querySelectorAll('#kl-chart path.line')[0].getAttribute('d').length") > 20
            )
            assert await page.evaluate("document.querySelectorAll('#kl-chart circle').length") == 1, "one measurement"
            assert await page.evaluate("document.querySelectorAll('#stale-chart rect').length") in (1, 2)
            assert "works inside this process" in await page.text("#replicas")
            assert (await page.text("#v-learner")).startswith("v")
            assert (await page.text("#v-sampler")).startswith("v")
            assert await page.sticks_out() == []
            assert (await page.picture()).startswith(b"\x89PNG")
            light = await page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (light == "rgb(246, 247, 246)") is not dark
            assert page.errors == []
            assert {request.removeprefix(url) for request in page.requests if not request.startswith("data:")} == {
                "",
                "events",
            }

        await assert_tokens_tell_what_they_cost(page)
        told = [e for e in events(out) if e["event"] == "answer.trained"]
        steps = [e["step"] for e in events(out) if e["event"] == "learner.step"]
        assert [e["step"] for e in told[:20]] == steps[:20]

        stop(process)
        await page.until("document.body.dataset.link === 'over'")
        assert await page.text("#phase") == "stopped"
        assert "the run is over" in await page.text("#link")
        assert finish(process).code == 3


async def test_a_node_that_stands_still_or_is_killed_is_not_called_live_and_is_found_again(
    world: World, tmp_path: Path, chromium: Browser
) -> None:
    out, port = tmp_path / "out", free_port()
    recipe = world.recipe(tmp_path / "r.py")
    same_port = ("--set", f"node.port={port}")
    with running(recipe, out, *same_port) as process:
        page = await chromium.open(f"http://127.0.0.1:{port}/", width=DESK[0], height=DESK[1])
        await page.until("document.body.dataset.link === 'live'")
        process.send_signal(signal.SIGSTOP)
        try:
            await page.until("/^no news for \\d+ s$/.test(document.querySelector('#link').innerText)")
        finally:
            process.send_signal(signal.SIGCONT)
        await page.until("document.body.dataset.link === 'live'")
        process.send_signal(signal.SIGKILL)
        await page.until("document.body.dataset.link === 'lost'")
        await page.until(
            "/^disconnected, last seen \\d+ s ago; trying again$/.test(document.querySelector('#link').innerText)"
        )
        assert int((await page.text("#step")).replace(",", "")) >= 3, "what was last seen stays"

    with running(recipe, out, *same_port, "--resume"):
        await page.until("document.body.dataset.link === 'live'")
        await page.until("document.querySelector('#phase').innerText === 'training'")
        assert await page.evaluate("state.curves.loss[0][0]") == 1, "the curve begins where the run did"
        assert await page.evaluate("state.curves.held_out[0].version") == 0


NASTY = """
from engine.actor import Actor
from engine.graph import Graph

_plain = recipe


class PassOn(Actor):
    def __init__(self, name, ports):
        super().__init__(name)
        self._ports = ports

    async def run(self):
        async for rollout in self._ports.input:
            await self._ports.output.send(rollout)
        self._ports.output.close()


def edit(graph):
    name = "<img src=x onerror=alert(1)>"
    return graph.insert(name, after="sampler", make=lambda ports: PassOn(name, ports))


def recipe():
    return _plain(), edit
"""


async def test_with_a_token_it_is_opened_once_and_then_by_the_cookie_and_names_that_are_html_stay_names(
    world: World, tmp_path: Path, chromium: Browser
) -> None:
    out = tmp_path / "out"
    (tmp_path / "token").write_text("open-sesame\n")
    recipe = world.recipe(tmp_path / "r.py", more=NASTY)
    with running(recipe, out, "--set", f"node.token_file={tmp_path / 'token'}"):
        stranger = await chromium.open(address(out), width=PHONE[0], height=PHONE[1])
        assert "wants the token" in await stranger.text("body")

        page = await chromium.open(f"{address(out)}?token=open-sesame", width=PHONE[0], height=PHONE[1])
        await page.until("document.body.dataset.link === 'live'")
        assert await page.evaluate("location.href") == address(out)
        assert await page.evaluate("document.cookie") == "", "out of reach of scripts"
        await page.go(address(out))
        await page.until("document.body.dataset.link === 'live'")

        await page.until("document.querySelectorAll('.actor').length === 6")
        assert await page.text("li:nth-child(3) .actor .name") == "<img src=x onerror=alert(1)>"
        assert await page.evaluate("document.querySelectorAll('img').length") == 0
        assert await page.sticks_out() == []
        assert page.errors == []
