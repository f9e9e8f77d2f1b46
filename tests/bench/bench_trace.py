"""How long the trace of a long run takes, and how much memory.

    python -m tests.bench.bench_trace [--quick] [--lines N] [--keep FOLDER]

Makes the log of a run of N lines (a million), with what a real one has in it in about the real proportions, and runs
``python -m engine.trace`` on it in a process of its own.
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
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="leave the log and its trace in this folder")
    add_options(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        log, trace = folder / "events.jsonl", folder / "trace.json"
        num_lines = write_log(log, options.lines // 20 if options.quick else options.lines)
        report = report_on(["engine.trace", str(folder), "-o", str(trace)], bench="trace", num_lines=num_lines)
        if not report.failures:
            sizes_mb = log.stat().st_size / 1e6, trace.stat().st_size / 1e6
            notes = (f"{sizes_mb[0]:.0f} MB of log became {sizes_mb[1]:.0f} MB of trace.",)
            report = msgspec.structs.replace(report, notes=notes)
    return finish(report, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
