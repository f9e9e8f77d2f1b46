"""A headless Chromium, driven over the DevTools protocol: what a person sees of a page, and what the browser complains
about. Nothing is installed for it but the browser itself (Debian: ``apt-get install chromium``).
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import signal
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_PATIENCE_S = 60.0
"""Longer than anything here takes on a busy machine; reaching it is a failure."""
_LOOK_EVERY_MS = 30


def needs_chromium() -> pytest.MarkDecorator:
    """Skips a test where there is no Chromium."""
    return pytest.mark.skipif(
        chromium() is None, reason=f"needs a Chromium: none of {', '.join(_NAMES)} is on the path (or in CHROMIUM)"
    )


def chromium() -> str | None:
    """The browser: what the environment variable CHROMIUM names, or the first on the path."""
    named = os.environ.get("CHROMIUM")
    return named or next((path for name in _NAMES if (path := shutil.which(name)) is not None), None)


@asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[Browser]:
    """A browser with a profile of its own in ``folder``; its processes are gone at the end."""
    path = chromium()
    assert path is not None
    process = await asyncio.create_subprocess_exec(
        path,
        "--headless=new",
        "--no-sandbox",  # as root, in a container
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
        "--hide-scrollbars",
        "--remote-debugging-port=0",
        f"--user-data-dir={folder}",
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    try:
        address = await _address(process.stderr)
        # What it says later is of no interest, but a full pipe would stop it.
        drain = asyncio.get_running_loop().create_task(process.stderr.read())
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            found = Browser(socket)
            try:
                yield found
            finally:
                await found.close()
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    await drain


async def _address(stderr: asyncio.StreamReader) -> str:
    async with asyncio.timeout(_PATIENCE_S):
        said = b""
        while line := await stderr.readline():
            said += line
            if b"DevTools listening on " in line:
                return line.decode().split("DevTools listening on ", 1)[1].strip()
    raise AssertionError(f"Chromium did not start:\n{said.decode(errors='replace')}")


class Browser:
    """Sends commands, and hands what comes back to whom it concerns."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._number = 0
        self._listeners: dict[str, list[Callable[[str, dict[str, Any]], None]]] = defaultdict(list)
        self._task = asyncio.get_running_loop().create_task(self._receive())

    async def open(self, url: str, *, width: int, height: int, dark: bool = False) -> Page:
        """A page of this size and colour scheme; narrow ones (< 600 px) are phones."""
        target = (await self.call("Target.createTarget", url="about:blank"))["targetId"]
        session = (await self.call("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        page = Page(self, session)
        self._listeners[session].append(page.hear)
        for domain in ("Page", "Runtime", "Log", "Network"):
            await page.call(f"{domain}.enable")
        await page.look(width=width, height=height, dark=dark)
        await page.go(url)
        return page

    async def call(self, method: str, *, session: str | None = None, **params: Any) -> Any:
        """Raises RuntimeError when the browser refuses."""
        self._number += 1
        number = self._number
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        await self._socket.send_str(json.dumps(message))
        async with asyncio.timeout(_PATIENCE_S):
            return await answer

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _receive(self) -> None:
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                answer = self._answers.pop(said["id"])
                if answer.done():
                    continue
                if "error" in said:
                    answer.set_exception(RuntimeError(f"Chromium: {said['error']}"))
                else:
                    answer.set_result(said["result"])
            else:
                for listener in self._listeners[said.get("sessionId", "")]:
                    listener(said["method"], said["params"])


class Page:
    """One tab.

    ``errors`` is what its console and its security policy complained about, ``requests`` every address asked for.
    """

    def __init__(self, owner: Browser, session: str) -> None:
        self._owner = owner
        self._session = session
        self.errors: list[str] = []
        self.requests: list[str] = []

    async def call(self, method: str, **params: Any) -> Any:
        return await self._owner.call(method, session=self._session, **params)

    async def go(self, url: str) -> None:
        """Return when the document is there. An answer without one (an error page) is no failure."""
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def look(self, *, width: int, height: int, dark: bool) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression, which may be a promise.

        Raises:
            AssertionError: it threw.
        """
        done = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, f"{expression}: {done['exceptionDetails']}"
        return done["result"].get("value")

    async def until(self, condition: str) -> None:
        """Return when a JavaScript expression is true."""
        look = (
            "new Promise((resolve) => { const look = () => {"
            f"if ({condition}) resolve(true); else setTimeout(look, {_LOOK_EVERY_MS}); }}; look(); }})"
        )
        async with asyncio.timeout(_PATIENCE_S):
            while True:
                try:
                    await self.evaluate(look)
                    return
                except RuntimeError as error:
                    # A navigation under way takes the promise along.
                    if "context" not in str(error):
                        raise

    async def text(self, selector: str) -> str:
        return str(await self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    async def sticks_out(self) -> list[str]:
        """Texts of the elements that are wider than the page, or than the section that they are in."""
        found: list[str] = await self.evaluate(
            "[document.documentElement, ...document.querySelectorAll('section')]"
            ".filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.innerText)"
        )
        return found

    async def key(self, name: str) -> None:
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name)

    async def point_at(self, selector: str) -> None:
        """Move the mouse over the middle of an element."""
        box = await self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center'});"
            " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        await self.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])

    async def picture(self) -> bytes:
        """The whole page as PNG."""
        size = (await self.call("Page.getLayoutMetrics"))["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(data["data"])

    def hear(self, method: str, params: dict[str, Any]) -> None:
        """Something happened in the tab."""
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(json.dumps(params["entry"]))
