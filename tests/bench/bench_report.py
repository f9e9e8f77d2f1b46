"""How long the report of a long run takes, and how much memory.

    python -m tests.bench.bench_report [--quick] [--lines N]

Runs ``python -m engine.report`` in a process of its own on the log that ``bench_trace`` makes: a million lines with
what a real one has in it, in about the real proportions.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.bench_trace import write_log
from tests.bench.report import OURS, Report, Row, Target, add_options, finish

LIMIT_S = 60.0
LIMIT_MIB = 1024.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000)
    add_options(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        num_lines = write_log(folder / "events.jsonl", options.lines // 20 if options.quick else options.lines)
        began = time.perf_counter()
        command = [sys.executable, "-m", "engine.report", str(folder)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        wall_s = time.perf_counter() - began
        # The only child of this process.
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            return finish(Report(bench="report", rows=(), failures=(done.stderr.strip(),)), as_json=options.json)
        page_kb = (folder / "report.html").stat().st_size / 1e3
    load = f"a log of {num_lines:,} lines"
    peak_mib = used.ru_maxrss / 1024
    rows = (
        Row(load=load, contender=OURS, value=wall_s, unit="s"),
        Row(load=load, contender=OURS, value=used.ru_utime + used.ru_stime, unit="CPU s"),
        Row(load=load, contender=OURS, value=peak_mib, unit="MiB at the peak"),
    )
    targets = (
        Target(what=load, found=wall_s, bound=LIMIT_S, at_most=True, unit="s"),
        Target(what=load, found=peak_mib, bound=LIMIT_MIB, at_most=True, unit="MiB"),
    )
    notes = (f"The page has {page_kb:.0f} kB.",)
    return finish(Report(bench="report", rows=rows, targets=targets, notes=notes), as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
