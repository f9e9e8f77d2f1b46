"""All benchmarks, one after the other, one process each; one table, printed and kept.

    python -m tests.bench [--quick] [--only NAME …] [--out FOLDER | --no-file]

The table goes to ``docs/measurements/DATE-bench.md`` (``DATE-bench-quick.md``), with date, commit, machine, and how
much of the machine others used meanwhile. It is written anew after each benchmark: who interrupts the rest keeps what
there is. Exits with 1 when a target was missed or a benchmark failed; all are run first.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import msgspec

from tests.bench.machine import Usage, commit, describe_machine, usage
from tests.bench.report import Report, number, progress

MEASUREMENTS = Path("docs/measurements")


class Bench(NamedTuple):
    """A module ``tests.bench.bench_NAME`` and how it is called."""

    name: str
    arguments: tuple[str, ...] = ()
    is_quick: bool = True
    """Has a short form, so that it belongs to a quick run."""
    reports: bool = True
    """Knows ``--json`` and ``--quick``; else its text is shown as it is."""


BENCHES = (
    Bench("channel"),
    Bench("pool"),
    Bench("tracing"),
    Bench("teacher_wire"),
    Bench("losses"),
    Bench("generation", arguments=("--cpu-time",)),
    Bench("first_rollout"),
    Bench("vllm", is_quick=False),
    Bench("memory"),
    Bench("trace"),
    Bench("report"),
    Bench("simulation"),
    Bench("megatron"),
    Bench("phases"),
    Bench("export"),
    Bench("end_to_end"),
    Bench("logprobs", is_quick=False, reports=False),
    Bench("gpu_losses", is_quick=False, reports=False),
    Bench("scoring", is_quick=False),
    Bench("main_job", is_quick=False),
)


class Done(NamedTuple):
    bench: Bench
    exit_code: int
    seconds: float
    report: Report | None
    """None: it said nothing that could be read."""
    text: str
    """What it said instead, or why it failed."""


def run(bench: Bench, *, quick: bool) -> Done:
    """One benchmark in a process of its own; what it says on the way goes to stderr."""
    command = [sys.executable, "-m", f"tests.bench.bench_{bench.name}", *bench.arguments]
    if bench.reports:
        command += ["--json", *(["--quick"] if quick else [])]
    began = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    seconds, text = time.monotonic() - began, done.stdout.decode(errors="replace").strip()
    report = read_report(text) if bench.reports else None
    return Done(bench, done.returncode, seconds, report, "" if report is not None else text)


def read_report(text: str) -> Report | None:
    """The object in the last line, if there is one."""
    try:
        return msgspec.json.decode(text.rpartition("\n")[2], type=Report)
    except msgspec.MsgspecError:
        return None


def as_markdown(
    results: Sequence[Done],
    *,
    at: datetime,
    revision: str,
    command: str,
    machine: str,
    others: str,
    not_run: Sequence[str] = (),
) -> str:
    """The page that is kept: a function of what was measured."""
    minutes = sum(done.seconds for done in results) / 60
    reports = [done.report for done in results if done.report is not None]
    rows = [
        (
            report.bench,
            row.load,
            row.contender,
            number(row.value),
            row.unit,
            "" if row.ratio is None else f"{row.ratio:.2f}",
        )
        for report in reports
        for row in report.rows
    ]
    page = [
        f"# Benchmarks, {at:%Y-%m-%d}",
        "",
        f"`{command}`, {minutes:.0f} minutes, begun {at:%H:%M} UTC. Commit {revision}. Machine: {machine}. {others}",
        *([f"Interrupted before: {', '.join(not_run)}."] if not_run else []),
        "",
        "A ratio says how many times better ours is than the contender of that row under the same load: less time,",
        "fewer bytes, more per second. It is the median over turns, not the quotient of two values of this table.",
        "",
        "| benchmark | load | contender | value | unit | ratio |",
        "|---|---|---|--:|---|--:|",
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows),
        "",
        "## Targets",
        "",
        *(f"- {report.bench}: {target}" for report in reports for target in report.targets),
        *(f"- {report.bench}: FAILED: {failure}" for report in reports for failure in report.failures),
    ]
    page += ["", "## Minutes", "", ", ".join(f"{done.bench.name} {done.seconds / 60:.1f}" for done in results)]
    notes = [f"- {report.bench}: {note}" for report in reports for note in report.notes]
    page += ["", "## Notes", "", *notes] if notes else []
    for done in results:
        if done.report is None:
            verdict = "ended well" if done.exit_code == 0 else f"FAILED with exit code {done.exit_code}"
            page += ["", f"## {done.bench.name}: {verdict}", "", "```text", done.text or "It said nothing.", "```"]
    return "\n".join(page) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer turns, and none of the long ones")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[bench.name for bench in BENCHES], default=None)
    parser.add_argument("--out", type=Path, default=MEASUREMENTS, metavar="FOLDER")
    parser.add_argument("--no-file", action="store_true", help="print the table, keep nothing")
    options = parser.parse_args()
    chosen = [
        bench
        for bench in BENCHES
        if (bench.name in options.only if options.only else bench.is_quick or not options.quick)
    ]
    # The revision before a page is written: that one would count as a change.
    at, before, revision = datetime.now(UTC), usage(), commit()
    if not options.no_file:
        options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{at:%Y-%m-%d}-bench{'-quick' if options.quick else ''}.md"
    results: list[Done] = []
    page = ""
    for bench in chosen:
        progress(f"== {bench.name}")
        results.append(run(bench, quick=options.quick))
        page = as_markdown(
            results,
            at=at,
            revision=revision,
            command=shlex.join(["make", "bench", *([f"ARGS={shlex.join(sys.argv[1:])}"] if sys.argv[1:] else [])]),
            machine=describe_machine(),
            others=said_of_others(before, usage()),
            not_run=[bench.name for bench in chosen[len(results) :]],
        )
        if not options.no_file:
            path.write_text(page, encoding="utf-8")
    sys.stdout.write(page)
    if not options.no_file:
        progress(f"written to {path}")
    return 1 if any(done.exit_code for done in results) else 0


def said_of_others(before: Usage, after: Usage) -> str:
    """One sentence: with half the machine gone to others, wall times mean nothing and CPU times little."""
    share = after.share_of_others(before)
    if share is None:
        return "What else the machine did meanwhile is not known."
    return f"Other processes used {share:.0%} of its cores meanwhile."


if __name__ == "__main__":
    sys.exit(main())
