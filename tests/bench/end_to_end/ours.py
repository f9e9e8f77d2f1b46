"""Our side of ``bench_end_to_end``: the command that users run, watched from outside.

CPU time is the process's own, read whenever a line of ``metrics.jsonl`` says that a step is done: every thread, the
event loop, ledger, log and metrics included, start-up and the checkpoint at the end not.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import msgspec

from tests.bench.end_to_end.workload import Outcome, Step
from tests.bench.process_clock import cpu_s, new_lines
from tests.bench.report import fair_environment

RECIPE = "tests/bench/end_to_end/recipe.py"


class _Line(msgspec.Struct):
    """Of metrics.jsonl."""

    num_tokens: int
    loss: float


def run(folder: Path, out: Path, *, steps: int, top_k: int, max_staleness: int) -> Outcome:
    """Steps 2 to ``steps``. The run itself goes on for ``max_staleness`` + 1 more, since nothing is sampled ahead for
    the steps behind its last one.

    Raises:
        RuntimeError: the run failed.
    """
    settings = {
        "student.path": folder / "student",
        "teacher.model": folder / "teacher",
        "data.path": folder / "prompts.jsonl",
        "steps": steps + max_staleness + 1,
        "teacher.top_k": top_k,
        "max_staleness": max_staleness,
    }
    command = [sys.executable, "-m", "engine.run", RECIPE, "--json", "--out", str(out)]
    command += [word for field, value in settings.items() for word in ("--set", f"{field}={value}")]
    with (folder / "ours.log").open("wb") as log:
        process = subprocess.Popen(command, env=fair_environment(), stdout=log, stderr=log)
        seen = ((line, cpu_s(process.pid)) for line in new_lines(out / "metrics.jsonl", process))
        readings = [(msgspec.json.decode(line, type=_Line), at_s) for line, at_s in itertools.islice(seen, steps)]
        process.terminate()
        process.wait()
    if len(readings) < steps:
        raise RuntimeError(f"the run ended after {len(readings)} steps: {(folder / 'ours.log').read_text()[-2000:]}")
    return Outcome(
        steps=[
            Step(cpu_s=at_s - before_s, num_tokens=line.num_tokens, loss=line.loss)
            for (_, before_s), (line, at_s) in itertools.pairwise(readings)
        ]
    )
