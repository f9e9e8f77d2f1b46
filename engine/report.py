"""The command: ``python -m engine.report RUN_DIR [-o FILE.html]``. Writes what a run was, did and came to as one HTML
page and as Markdown.

Works on a run that goes on, one that was killed and one that failed. Nothing in the run's folder is changed but the two
files. Exit codes: 0 written, 2 there is no such run or the files cannot be written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine.errors import UserError
from engine.monitor.report.files import write_report
from engine.monitor.report.text import one_line
from engine.tracing import Tracing

_MAX_LINE = 20_000
"""Longer than two paths can be. The names of files may hold what no terminal can show."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parse(arguments)
    try:
        # What is logged while a run is read (a torn line, say) is counted in the report; nobody wants it on stdout.
        with Tracing():
            written = write_report(options.run_dir, options.out)
    except UserError as error:
        sys.stderr.write(f"error: {one_line(str(error), limit=_MAX_LINE)}\n")
        return error.exit_code
    places = one_line(f"{written.html} and {written.markdown}", limit=_MAX_LINE)
    sys.stdout.write(f"report: {places}\n")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m engine.report",
        description="Write what a run was, did and came to: one HTML page, and the same as Markdown.",
        epilog="Exit codes: 0 written; 2 there is no such run, or the files cannot be written.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="folder of a run, live or ended")
    parser.add_argument(
        "-o",
        "--out",
        metavar="FILE.html",
        type=Path,
        help="where to (RUN_DIR/report.html); the Markdown goes beside it",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
