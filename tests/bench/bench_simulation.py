"""What a simulation costs, and whether its cost per rollout stays when everything grows:
``python -m tests.bench.bench_simulation``."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path

from engine.load_recipe import load_recipe
from engine.simulate.lengths import Drawn
from engine.simulate.simulation import simulate
from tests.bench.report import OURS, Report, Row, Target, add_options, finish, progress

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "replay_longtail.py"
MAX_COMMAND_S = 10.0
MAX_GROWTH = 1.5

SMALL = "40 steps of 128 rollouts"
LARGE = (
    ("1,000 samplers and 100 teacher replicas", ("replay.num_samplers=1000", "replay.num_teachers=100")),
    ("100 times the rollouts in a step", ("rollouts_per_step=12800",)),
    ("100 times the steps", ("steps=4000",)),
)
QUICK = (*LARGE[:1], ("100 times the rollouts in each of 4 steps", ("rollouts_per_step=12800", "steps=4")))
"""The others take minutes."""


def command_s() -> float:
    """CPU of ``--simulate --json``, imports, baselines and what-ifs included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "engine.run", str(RECIPE), "--simulate", "--json"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def rollout_us(*assignments: str, rounds: int = 2) -> float:
    """CPU per rollout of one simulation."""
    recipe, graph = load_recipe(RECIPE, list(assignments))
    lengths = Drawn(recipe)
    return min(simulate(recipe, graph, lengths).cpu_s_per_rollout for _ in range(rounds)) * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    options = parser.parse_args()
    spent_s = command_s()
    small_us = rollout_us()
    rows = [
        Row(load=f"the command, {SMALL}", contender=OURS, value=spent_s, unit="CPU s"),
        Row(load=SMALL, contender=OURS, value=small_us, unit="CPU µs per rollout"),
    ]
    targets = [Target(what="CPU of the command", found=spent_s, bound=MAX_COMMAND_S, at_most=True, unit="s")]
    for label, assignments in QUICK if options.quick else LARGE:
        progress(label)
        large_us = rollout_us(*assignments, rounds=1)
        rows.append(Row(load=label, contender=OURS, value=large_us, unit="CPU µs per rollout"))
        targets.append(Target(what=f"growth: {label}", found=large_us / small_us, bound=MAX_GROWTH, at_most=True))
    report = Report(bench="simulation", rows=tuple(rows), targets=tuple(targets))
    return finish(report, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
