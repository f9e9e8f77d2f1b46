"""From the start of the process to the first answer, beside a plain script that generates one.

    python -m tests.bench.bench_first_rollout [--quick] [--turns N]

Two loads: a tiny student, and the demo's (after ``make models``), each its own teacher in the same process. Ours is
``python -m engine.run`` from the birth of the process to its first ``sampler.rollout``: imports, checks of recipe,
models and prompts, ledger, actors, loading the student for sampling and for training, and the answer. The script
imports torch and transformers, loads the student once and calls ``generate``: what nobody can do without. CPU time at
that moment, and wall time for information: it depends on what else the machine does. The two take turns.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from tests.bench.process_clock import cpu_s, new_lines
from tests.bench.report import OURS, Report, Row, Target, add_options, fair_environment, finish
from tests.support.models import tiny_model, write_jsonl

SCRIPT = "plain script"
LIMIT = 2.5
"""Of the script's CPU. The student is loaded twice and looked at once more, the teacher once."""

DEMO = Path("models/smollm2/student")
NEW_TOKENS = 16

_PLAIN_SCRIPT = """
import sys, time
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
prompt = tokenizer("How long is a piece of string?", return_tensors="pt")
length = int(sys.argv[2])
model.generate(**prompt, max_new_tokens=length, min_new_tokens=length, do_sample=True, pad_token_id=0)
sys.stdout.write(f"{time.process_time()}\\n")
"""


class Start(NamedTuple):
    cpu_s: float
    wall_s: float


class _Line(msgspec.Struct):
    event: str


def ours(student: Path, prompts: Path, out: Path) -> Start:
    """Ends the run as soon as it has an answer.

    Raises:
        RuntimeError: it ended without one.
    """
    settings = {
        "student.path": student,
        "teacher.model": student,
        "data.path": prompts,
        "sampler.max_new_tokens": NEW_TOKENS,
        "sampler.stop_ids": "[]",
    }
    command = [sys.executable, "-m", "engine.run", "tests/bench/tiny_recipe.py", "--json", "--out", str(out)]
    command += [word for field, value in settings.items() for word in ("--set", f"{field}={value}")]
    began = time.monotonic()
    process = subprocess.Popen(command, env=fair_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        for line in new_lines(out / "events.jsonl", process):
            if msgspec.json.decode(line, type=_Line).event == "sampler.rollout":
                return Start(cpu_s(process.pid), time.monotonic() - began)
    finally:
        process.kill()
        _, said = process.communicate()
    raise RuntimeError(f"the run ended before its first answer: {said.decode(errors='replace')[-2000:]}")


def script(student: Path, _: Path, __: Path) -> Start:
    began = time.monotonic()
    command = [sys.executable, "-c", _PLAIN_SCRIPT, str(student), str(NEW_TOKENS)]
    done = subprocess.run(command, env=fair_environment(), capture_output=True, check=True)
    return Start(float(done.stdout), time.monotonic() - began)


CONTENDERS: dict[str, Callable[[Path, Path, Path], Start]] = {OURS: ours, SCRIPT: script}


def measure(student: Path, scratch: Path, *, turns: int) -> dict[str, list[Start]]:
    prompts = write_jsonl(scratch / "prompts.jsonl", [{"prompt": f"What is {i} + {i}?"} for i in range(16)])
    starts: dict[str, list[Start]] = {name: [] for name in CONTENDERS}
    for turn in range(turns):
        for name, contender in CONTENDERS.items():
            starts[name].append(contender(student, prompts, scratch / f"run-{turn}"))
    return starts


def rows_of(load: str, starts: dict[str, list[Start]]) -> list[Row]:
    return [
        Row(
            load=load,
            contender=name,
            value=statistics.median(getattr(start, field) for start in found),
            unit=unit,
            ratio=None
            if name == OURS
            else statistics.median(
                getattr(their, field) / getattr(our, field) for their, our in zip(found, starts[OURS], strict=True)
            ),
        )
        for field, unit in (("cpu_s", "CPU s"), ("wall_s", "s"))
        for name, found in starts.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    add_options(parser)
    options = parser.parse_args()
    turns = 1 if options.quick else options.turns
    rows: list[Row] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        rows += rows_of("tiny student", measure(tiny_model(Path(scratch) / "tiny"), Path(scratch), turns=turns))
    if (DEMO / "config.json").is_file():
        with tempfile.TemporaryDirectory() as scratch:
            rows += rows_of("the demo's student", measure(DEMO.absolute(), Path(scratch), turns=turns))
    else:
        notes.append("The demo's student was left out: its models are not there (make models).")
    targets = [
        Target(what=f"{row.load}: CPU, times the plain script's", found=1 / row.ratio, bound=LIMIT, at_most=True)
        for row in rows
        if row.ratio is not None and row.unit == "CPU s"
    ]
    report = Report(bench="first rollout", rows=tuple(rows), targets=tuple(targets), notes=tuple(notes))
    return finish(report, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
