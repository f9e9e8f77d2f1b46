"""CPU per trained token: ours beside TRL's two distillation trainers and a plain serial script.

    python -m tests.bench.bench_end_to_end [--quick] [--vocab 32000 512]

Equal for all: models (student: hidden 128, 4 layers; teacher: hidden 256, 8 layers; random weights, fp32), the 32
prompts of each step (24 to 32 tokens), 64 sampled tokens for each at temperature 1 (there is no end of sequence),
forward KL from teacher to student over the whole vocabulary, AdamW, one torch thread, allocator settings, torch and
transformers themselves. The number of tokens trained is compared. Counted is the CPU time of the whole process between
the ends of its optimizer steps, without the first: start-up and imports are not in it. The contenders take turns, each
in a process of its own; a ratio is the median over the turns of a rival's time divided by ours of the same turn.

"ours, top 64" is what a recipe would have: the teacher's top 64, the sampled token, and one category for the rest,
which the rivals do not offer for a teacher in the same process. "one step ahead" is that with ``max_staleness=1``.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from tests.bench.end_to_end import ours, workload
from tests.bench.end_to_end.trl_environment import TrlMissing, python_with_trl
from tests.bench.end_to_end.workload import NEW_TOKENS, NUM_PROMPTS, Outcome
from tests.bench.report import OURS, Report, Row, Target, add_options, fair_environment, finish, progress

SERIAL, GKD, DISTILLATION = "serial script", "TRL GKDTrainer", "TRL DistillationTrainer"
LISTED, AHEAD = "ours, top 64", "ours, top 64, one step ahead"

TOP_K = 64
TOKENS_PER_STEP = NUM_PROMPTS * NEW_TOKENS
PADDING_SHARE = 0.01
"""TRL takes a sampled padding token for padding and does not train it: that many may be missing."""

Contender = Callable[[Path, Path, int], Outcome]
"""Of the workload's folder, a folder of its own and the number of steps."""


class Load(NamedTuple):
    vocab: int
    num_steps: int
    """Of each contender in each turn, the first one not counted."""
    num_turns: int
    over_trl: float
    over_serial: float
    """Least ratios."""


LOADS = (
    Load(vocab=32_000, num_steps=5, num_turns=3, over_trl=1.6, over_serial=1.2),
    Load(vocab=512, num_steps=11, num_turns=3, over_trl=1.0, over_serial=1.0),
)


def measure(load: Load, contenders: Mapping[str, Contender]) -> dict[str, list[Outcome]]:
    """Each contender once per turn."""
    outcomes: dict[str, list[Outcome]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as scratch:
        folder = workload.make(Path(scratch), vocab=load.vocab)
        for turn in range(load.num_turns):
            for name, run in contenders.items():
                outcome = run(folder, folder / f"{turn}-{name}", load.num_steps)
                check_tokens(name, outcome, num_steps=load.num_steps)
                outcomes[name].append(outcome)
                progress(
                    f"vocabulary {load.vocab}, turn {turn + 1}, {name}: {outcome.cpu_us_per_token:.0f} us per token, "
                    f"loss {outcome.steps[0].loss:.4f}"
                )
    return outcomes


def check_tokens(name: str, outcome: Outcome, *, num_steps: int) -> None:
    """Every contender must have done the same work.

    Raises:
        RuntimeError: it did not.
    """
    counts = [step.num_tokens for step in outcome.steps]
    least = TOKENS_PER_STEP * (1 - PADDING_SHARE)
    if len(counts) != num_steps - 1 or not all(least <= count <= TOKENS_PER_STEP for count in counts):
        raise RuntimeError(
            f"{name} trained {counts} tokens, expected {TOKENS_PER_STEP} in each of {num_steps - 1} steps"
        )


def rows_of(load: Load, outcomes: Mapping[str, Sequence[Outcome]]) -> list[Row]:
    return [
        Row(
            load=f"vocabulary {load.vocab:,}",
            contender=name,
            value=statistics.median(outcome.cpu_us_per_token for outcome in turns),
            unit="CPU µs/token",
            ratio=None if name == OURS else ratio(turns, outcomes[OURS]),
        )
        for name, turns in outcomes.items()
    ]


def ratio(theirs: Iterable[Outcome], ours: Iterable[Outcome]) -> float:
    """Median over the turns."""
    return statistics.median(
        their.cpu_us_per_token / our.cpu_us_per_token for their, our in zip(theirs, ours, strict=True)
    )


def targets_of(load: Load, rows: Iterable[Row]) -> list[Target]:
    ratios = {row.contender: row.ratio for row in rows if row.ratio is not None}
    of_trl = [ratios[name] for name in (GKD, DISTILLATION) if name in ratios]
    where = f"vocabulary {load.vocab:,}"
    targets = [Target(what=f"{where}, CPU of the serial script", found=ratios[SERIAL], bound=load.over_serial)]
    if of_trl:
        targets.append(Target(what=f"{where}, CPU of TRL's better trainer", found=min(of_trl), bound=load.over_trl))
    return targets


def contenders_of(vocab: int, trl: Path | None, *, quick: bool) -> dict[str, Contender]:
    found: dict[str, Contender] = {OURS: partial(_ours, top_k=vocab, max_staleness=0)}
    found[SERIAL] = partial(_script, sys.executable, ["tests.bench.end_to_end.serial"])
    if trl is not None:
        found[GKD] = partial(_script, str(trl), ["tests.bench.end_to_end.trl", "gkd"])
        found[DISTILLATION] = partial(_script, str(trl), ["tests.bench.end_to_end.trl", "distillation"])
    if not quick:
        found[LISTED] = partial(_ours, top_k=min(TOP_K, vocab), max_staleness=0)
        found[AHEAD] = partial(_ours, top_k=min(TOP_K, vocab), max_staleness=1)
    return found


def _ours(folder: Path, out: Path, num_steps: int, *, top_k: int, max_staleness: int) -> Outcome:
    return ours.run(folder, out, steps=num_steps, top_k=top_k, max_staleness=max_staleness)


def _script(python: str, module: Sequence[str], folder: Path, _: Path, num_steps: int) -> Outcome:
    command = [python, "-m", *module, str(folder), "--steps", str(num_steps)]
    done = subprocess.run(command, env=fair_environment(), capture_output=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(module)} failed: {done.stderr.decode(errors='replace')[-2000:]}")
    # TRL writes its own lines to stdout.
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Outcome)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[load.vocab for load in LOADS])
    add_options(parser)
    options = parser.parse_args()
    failures: list[str] = []
    trl: Path | None = None
    try:
        trl = python_with_trl()
    except TrlMissing as error:
        failures.append(str(error))
    rows: list[Row] = []
    targets: list[Target] = []
    for load in LOADS:
        if load.vocab not in options.vocab:
            continue
        if options.quick:
            load = load._replace(num_steps=3, num_turns=1)
        found = rows_of(load, measure(load, contenders_of(load.vocab, trl, quick=options.quick)))
        rows += found
        targets += targets_of(load, found)
    report = Report(
        bench="end to end",
        rows=tuple(rows),
        targets=tuple(targets),
        notes=(f"All compare whole vocabularies, but for what is named top {TOP_K}: that many, and the rest as one.",),
        failures=tuple(failures),
    )
    return finish(report, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
