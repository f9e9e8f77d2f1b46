"""How long the report of a long run takes, and how much memory.

    python -m tests.bench.bench_report [--quick] [--lines N]

Runs ``python -m engine.report`` in a process of its own on the log that ``long_log`` makes: a million lines with
what a real one has in it, in about the real proportions.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import msgspec

from tests.bench.long_log import add_lines_option, report_on, write_log
from tests.bench.report import add_options, finish


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_lines_option(parser)
    add_options(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        num_lines = write_log(folder / "events.jsonl", options.lines // 20 if options.quick else options.lines)
        report = report_on(["engine.report", str(folder)], bench="report", num_lines=num_lines)
        if not report.failures:
            page_kb = (folder / "report.html").stat().st_size / 1e3
            report = msgspec.structs.replace(report, notes=(f"The page has {page_kb:.0f} kB.",))
    return finish(report, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
