"""The page as a browser shows it."""

from __future__ import annotations

from pathlib import Path

from engine.monitor.report.files import write_report
from tests.engine.monitor.test_report import make_run
from tests.support.browser import browser, needs_chromium

OPEN_ALL = "document.querySelectorAll('details').forEach((details) => { details.open = true; })"


@needs_chromium()
async def test_it_fits_on_a_phone_and_on_a_desk_asks_for_nothing_and_follows_the_scheme(tmp_path: Path) -> None:
    address = write_report(make_run(tmp_path / "run")).html.resolve().as_uri()
    grounds = []
    async with browser(tmp_path / "profile") as chromium:
        for width, dark in ((390, False), (1280, True)):
            page = await chromium.open(address, width=width, height=800, dark=dark)
            await page.evaluate(OPEN_ALL)

            assert await page.evaluate("document.documentElement.scrollWidth") == width
            assert page.errors == []
            assert page.requests == [address]
            assert "The run finished after 30 of 30 steps." in await page.text("main")
            assert await page.evaluate("document.querySelectorAll('figure > svg').length") == 6
            grounds.append(await page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(255, 255, 255)", "rgb(20, 23, 26)"], "the style sheet is the one that its policy allows"
