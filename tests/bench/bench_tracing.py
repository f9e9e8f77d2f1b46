"""What a line of the log costs: ``python -m tests.bench.bench_tracing``. Microseconds per call, best of five rounds."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from engine.metrics import NodeMetrics
from engine.monitor.view import RunView
from engine.tracing import Tracing, bound, log, span
from tests.bench.report import OURS, Report, Row, add_options, finish

_NUM_CALLS = 5_000
_ROUNDS = 5


def best_us(call: Callable[[int], object]) -> float:
    """Microseconds per call in the quickest round."""
    best = float("inf")
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        for n in range(_NUM_CALLS):
            call(n)
        best = min(best, time.perf_counter() - start)
    return best / _NUM_CALLS * 1e6


def fact(n: int) -> None:
    log.info("rollout.dispatched", rollout_id=n, epoch=0, prompt_index=3, sample_index=0)


def piece_of_work(n: int) -> None:
    with span("sampler.rollout", rollout_id=n) as facts:
        facts.add(version_first=3, version_last=4, num_tokens=48, num_prompt_tokens=30, finish_reason="stop")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    options = parser.parse_args()
    costs: list[tuple[str, float]] = []
    with tempfile.TemporaryDirectory() as folder, Tracing(level="info") as tracing:
        tracing.open(Path(folder), run="bench", node="0")
        with bound(actor="sampler"):
            costs.append(("a fact", best_us(fact)))
            costs.append(("a span", best_us(piece_of_work)))
            costs.append(("a line below the level", best_us(lambda n: log.debug("decode.step", n=n))))
            subscription = tracing.subscribe("metrics", NodeMetrics().apply)
            costs.append(("a span, with metrics", best_us(piece_of_work)))
            subscription.cancel()
        lines: list[dict[str, object]] = []
        tracing.subscribe("collect", lambda event: lines.append(dict(event)))
        piece_of_work(1)
        view = RunView()
        costs.append(("the view taking in a span", best_us(lambda _: view.apply(lines[0]))))
    rows = tuple(Row(load=load, contender=OURS, value=cost_us, unit="µs") for load, cost_us in costs)
    return finish(Report(bench="log lines", rows=rows), as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
