"""The two files of a report: where they go, and that they are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import msgspec

from engine.errors import RunDirError
from engine.monitor.report.compose import compose
from engine.monitor.report.gather import gather
from engine.monitor.report.html import html
from engine.monitor.report.markdown import markdown
from engine.run_dir import RunDir


class Written(msgspec.Struct, frozen=True, kw_only=True):
    html: Path
    markdown: Path


def write_report(folder: Path, out: Path | None = None) -> Written:
    """Read a run and write its report.

    Args:
        folder: of the run.
        out: the page, ``*.html``; the Markdown goes beside it as ``*.md`` (or the other way round). A folder: into it.
            None: into the run's folder.

    Raises:
        RunDirError: ``folder`` holds no run, or ``out`` cannot be written or is named otherwise.
    """
    places = _places(folder, out)
    document = compose(gather(folder))
    run_dir = RunDir(folder)
    for path, text in ((places.html, html(document)), (places.markdown, markdown(document))):
        # What is in a file may hold halves of characters; what cannot be written has been made visible before.
        run_dir.write(path, text.encode(errors="backslashreplace"))
    return places


def _places(folder: Path, out: Path | None) -> Written:
    page = RunDir(folder).report if out is None else out / "report.html" if out.is_dir() else out
    if page.suffix not in (".html", ".htm", ".md"):
        raise RunDirError(f"-o {out}: expected a name that ends in .html (the Markdown goes beside it), or a folder")
    if page.suffix == ".md":
        return Written(html=page.with_suffix(".html"), markdown=page)
    if out is not None and not page.parent.is_dir():
        raise RunDirError(f"-o {out}: there is no folder {page.parent}; make it, or name another one")
    return Written(html=page, markdown=page.with_suffix(".md"))
