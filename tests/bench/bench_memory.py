"""Memory over time: a run of some hundred steps must not grow.

    python -m tests.bench.bench_memory [--quick] [--steps N]

A tiny run through ``python -m engine.run``, so that what a model needs is small beside what is kept by mistake. The
resident memory of the process is read after every optimizer step. The slope is the median of the slopes between
readings that lie a quarter of them apart, without the first half of the run, in which caches and the allocator fill up:
one jump, or one step back, does not move it. The largest cache is the teacher's: 64 MiB of answers that it would give
again; with answers as large as here it is full after 170 steps.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.bench.process_clock import new_lines, resident_bytes
from tests.bench.report import OURS, Report, Row, Target, add_options, fair_environment, finish
from tests.support.models import tiny_model, write_jsonl

LIMIT_KIB = 8.0
"""Per step of 8 rollouts. A step may leave behind its points in the curves; an answer kept by mistake is more."""

TOP_K = 384
"""The whole vocabulary: 48 KiB per answer."""

SETTLED_FROM = 1 / 2
"""Share of the run that is left out."""


def slope(values: Sequence[float]) -> float:
    """Per reading: the median over pairs a quarter of the readings apart, of which a single jump lies in a third.

    Raises:
        ValueError: fewer than two values.
    """
    apart = max(1, len(values) // 4)
    if len(values) < 2:
        raise ValueError(f"a slope needs at least 2 values, got {len(values)}")
    return statistics.median((b - a) / apart for a, b in zip(values, values[apart:], strict=False))


def measure(folder: Path, *, num_steps: int) -> list[int]:
    """Resident bytes after each step.

    Raises:
        RuntimeError: the run failed.
    """
    out = folder / "run"
    settings = {
        "student.path": tiny_model(folder / "student", seed=2),
        "teacher.model": tiny_model(folder / "teacher", seed=1),
        "data.path": write_jsonl(folder / "prompts.jsonl", [{"prompt": f"What is {i} + {i}?"} for i in range(64)]),
        "teacher.top_k": TOP_K,
        "steps": num_steps,
    }
    command = [sys.executable, "-m", "engine.run", "tests/bench/tiny_recipe.py", "--json", "--out", str(out)]
    command += [word for field, value in settings.items() for word in ("--set", f"{field}={value}")]
    with (folder / "run.log").open("wb") as log:
        # As a user runs it: with the allocator's own settings.
        environment = {name: text for name, text in fair_environment().items() if not name.startswith("MALLOC_")}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        readings = []
        for _ in new_lines(out / "metrics.jsonl", process):
            with contextlib.suppress(OSError, ValueError):  # it may end while its last line is read
                readings.append(resident_bytes(process.pid))
        if process.wait() != 0:
            raise RuntimeError(f"the run failed: {(folder / 'run.log').read_text()[-2000:]}")
    return readings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    add_options(parser)
    options = parser.parse_args()
    num_steps = 700 if options.quick else options.steps
    with tempfile.TemporaryDirectory() as scratch:
        readings = measure(Path(scratch), num_steps=num_steps)
    settled = readings[round(len(readings) * SETTLED_FROM) :]
    found_kib = slope(settled) / 1024
    load = f"{num_steps} steps of 8 rollouts"
    rows = (
        Row(load=load, contender=OURS, value=readings[0] / 2**20, unit="MiB after step 1"),
        Row(load=load, contender=OURS, value=settled[0] / 2**20, unit=f"MiB after step {num_steps - len(settled) + 1}"),
        Row(load=load, contender=OURS, value=settled[-1] / 2**20, unit="MiB at the end"),
        Row(load=load, contender=OURS, value=found_kib, unit="KiB/step"),
    )
    target = Target(what="growth", found=found_kib, bound=LIMIT_KIB, at_most=True, unit="KiB/step")
    return finish(Report(bench="memory", rows=rows, targets=(target,)), as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
