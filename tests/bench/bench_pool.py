"""What the pool adds to one score, beside a replica that answers at once.

    python -m tests.bench.bench_pool [--quick] [--repeats N] [--scores N]

CPU time of the process on a fresh uvloop, best of the repeats.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

import structlog
import uvloop

from engine.clock import SystemClock
from engine.recipe import HttpTeacher
from teacher.pool import ReplicaPool
from teacher.protocol import Scores, Teacher, TeacherInfo
from tests.bench.report import OURS, Report, Row, Target, add_options, finish
from tests.support.replicas import INFO, scores_for

LIMIT_US = 20.0
"""A score takes milliseconds at the very least; measured 4 to 6 µs on 2 shared cores."""


class Immediate:
    """A replica that answers without a wait, always the same."""

    def __init__(self) -> None:
        self._scores = scores_for((1,), 1)

    async def info(self) -> TeacherInfo:
        return INFO

    async def ready(self) -> bool:
        return True

    async def score(self, **_: object) -> Scores:
        return self._scores

    async def close(self) -> None: ...


async def measure(*, num_replicas: int, hedge_after_s: float | None, repeats: int, num_scores: int) -> float:
    """Microseconds that the pool adds per score."""
    replicas = {f"r{n}": Immediate() for n in range(num_replicas)}
    config = HttpTeacher(urls=("http://nowhere",), hedge_after_s=hedge_after_s)
    pool = ReplicaPool(replicas=replicas, config=config, clock=SystemClock(), rng=random.Random(0))
    await seconds(pool, 100)
    added = [await seconds(pool, num_scores) - await seconds(replicas["r0"], num_scores) for _ in range(repeats)]
    await pool.close()
    return min(added) / num_scores * 1e6


async def seconds(teacher: Teacher, num_scores: int) -> float:
    began = time.process_time()
    for _ in range(num_scores):
        await teacher.score(prompt_ids=(1,), response_ids=(1,), top_k=1, request_id="bench")
    return time.process_time() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--scores", type=int, default=20_000)
    add_options(parser)
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("warning"))
    rows = []
    for num_replicas, hedge_after_s in ((1, None), (4, None), (4, 1.0)):
        added_us = uvloop.run(
            measure(
                num_replicas=num_replicas,
                hedge_after_s=hedge_after_s,
                repeats=3 if options.quick else options.repeats,
                num_scores=options.scores,
            )
        )
        hedging = "no hedging" if hedge_after_s is None else f"hedging after {hedge_after_s:g} s"
        load = f"{num_replicas} replica{'s' if num_replicas > 1 else ''}, {hedging}"
        rows.append(Row(load=load, contender=OURS, value=added_us, unit="CPU µs/score"))
    worst = Target(
        what="the pool adds", found=max(row.value for row in rows), bound=LIMIT_US, at_most=True, unit="µs/score"
    )
    return finish(Report(bench="replica pool", rows=tuple(rows), targets=(worst,)), as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
