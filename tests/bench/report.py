"""What a benchmark has to say, in one form: rows with ratios, targets met or missed, and how the runner reads them.

A benchmark prints a table for people. With ``--json`` it prints one JSON object instead, which
``python -m tests.bench`` collects. A ratio above 1 always means that ours is better: less time, fewer bytes, more
tokens per second.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import msgspec

OURS = "ours"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One measured number."""

    load: str
    """What was done."""
    contender: str
    """Who did it: "ours", or begins with it, or a rival."""
    value: float
    unit: str
    ratio: float | None = None
    """How many times better ours is under the same load; None: a number of its own, or ours itself."""


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A number that was promised."""

    what: str
    found: float
    bound: float
    at_most: bool = False
    """The bound is an upper one."""
    unit: str = "×"

    @property
    def is_met(self) -> bool:
        return self.found <= self.bound if self.at_most else self.found >= self.bound

    def __str__(self) -> str:
        sign, verdict = "≤" if self.at_most else "≥", "met" if self.is_met else "MISSED"
        return f"{self.what}: {number(self.found)} {self.unit} (target {sign} {number(self.bound)}): {verdict}"


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One benchmark's outcome."""

    bench: str
    rows: tuple[Row, ...]
    targets: tuple[Target, ...] = ()
    notes: tuple[str, ...] = ()
    """What must be known to read the numbers; one sentence each."""
    failures: tuple[str, ...] = ()
    """What could not be measured, or went wrong."""

    @property
    def is_met(self) -> bool:
        return not self.failures and all(target.is_met for target in self.targets)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The two that every benchmark takes."""
    parser.add_argument("--quick", action="store_true", help="fewer turns: shows that it works, less what it costs")
    parser.add_argument("--json", action="store_true", help="one JSON object for `python -m tests.bench`")


def finish(report: Report, *, as_json: bool) -> int:
    """Say it, and return the exit code: 1 when a target was missed or something could not be measured."""
    sys.stdout.write(msgspec.json.encode(report).decode() + "\n" if as_json else as_text(report) + "\n")
    sys.stdout.flush()
    return 0 if report.is_met else 1


def progress(text: str) -> None:
    """One line to stderr for whoever waits."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def as_text(report: Report) -> str:
    """A table, then a line per target."""
    cells = [
        (row.load, row.contender, number(row.value), row.unit, "" if row.ratio is None else f"{row.ratio:.2f}")
        for row in report.rows
    ]
    lines = aligned([("load", "contender", "value", "unit", "× ours"), *cells], right=(2, 4))
    lines += ["", *report.notes] if report.notes else []
    lines += ["", *map(str, report.targets)] if report.targets else []
    return "\n".join([*lines, *(f"FAILED: {failure}" for failure in report.failures)])


def aligned(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """Columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if at in right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def number(value: float) -> str:
    """Three significant digits, and no exponent for what people can read without."""
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100 or value == int(value):
        return f"{value:.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 1 else f"{value:.3g}"


def fair_environment() -> dict[str, str]:
    """Variables that every contender's process gets alike: one thread for each computation, an allocator that keeps
    what it has (with glibc's defaults big tensors cost a page fault per 4 KiB each time), no network."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
        "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
