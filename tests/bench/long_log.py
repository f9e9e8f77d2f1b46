"""The log of a long run, with what a real one has in it in about the real proportions, and what it costs a command to
read it: at most a minute and a gibibyte for a million lines."""

from __future__ import annotations

import argparse
import heapq
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from tests.bench.report import OURS, Report, Row, Target

LIMIT_S = 60.0
LIMIT_MIB = 1024.0

_SLOTS = 256
_PER_STEP = 128
_BEGIN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
_UPTIME_NS = 10**15


def lines(num_lines: int) -> Iterator[dict[str, Any]]:
    """A run whose sampler answers ``_SLOTS`` prompts at a time, in the order in which it would log them."""
    draw = random.Random(0)
    now_us, rollout_id, step, written = 0, 0, 0, 4
    ends = sorted(draw.randint(1, 20_000_000) for _ in range(_SLOTS))
    """When the answers under way end: a heap."""
    scored: list[int] = []
    actors = (
        ("prompt_feeder", None, "prompts"),
        ("sampler", "prompts", "rollouts"),
        ("teacher_proxy", "rollouts", "scored"),
        ("learner", "scored", "versions"),
        ("weight_syncer", "versions", None),
    )
    graph = [{"name": name, "consumes": consumes, "produces": produces} for name, consumes, produces in actors]
    yield fact(0, "log.opened", pid=1, start_ns=_UPTIME_NS)
    yield fact(0, "run.graph", actors=graph)
    yield fact(0, "actor.state_changed", actor="learner", before="starting", after="running")
    yield fact(0, "actor.state_changed", actor="sampler", before="starting", after="running")
    next_stats_us, waited_s = 1_000_000, 0.0
    while written < num_lines:
        now_us = ends[0]
        while next_stats_us < now_us:
            waited_s += draw.random()
            for name in ("prompts", "rollouts", "scored", "versions"):
                yield fact(
                    next_stats_us,
                    "channel.stats",
                    channel=name,
                    items=draw.randint(0, 16),
                    max_items=16,
                    sent_total=rollout_id,
                    send_wait_s=waited_s,
                    receive_wait_s=waited_s,
                )
            yield fact(
                next_stats_us,
                "generator.stats",
                version=step,
                running=_SLOTS,
                waiting=4,
                num_slots=_SLOTS,
                tokens_total=rollout_id * 48,
                busy_s=next_stats_us / 1e6,
            )
            yield fact(next_stats_us, "loop.lag", lag_s=0.001)
            next_stats_us += 1_000_000
            written += 6
        yield fact(now_us, "rollout.dispatched", rollout_id=rollout_id, epoch=0, prompt_index=1, sample_index=0)
        yield span(
            now_us,
            draw.randint(1, min(now_us, 20_000_000)),
            "sampler.rollout",
            actor="sampler",
            rollout_id=rollout_id,
            version_first=step,
            version_last=step,
            num_tokens=48,
            num_prompt_tokens=30,
            finish_reason="stop",
        )
        yield span(now_us + 400, 300, "teacher.score", actor="teacher_proxy", rollout_id=rollout_id, num_tokens=48)
        scored.append(rollout_id)
        written += 3
        rollout_id += 1
        heapq.heapreplace(ends, now_us + draw.randint(1_000, 20_000_000))
        if len(scored) == _PER_STEP:
            step += 1
            for first in range(0, _PER_STEP, 8):
                ids = scored[first : first + 8]
                yield span(
                    now_us + 500 + 50 * first,
                    300,
                    "learner.micro_batch",
                    actor="learner",
                    step=step,
                    rollout_ids=ids,
                    num_rollouts=8,
                    num_tokens=384,
                    num_computed_tokens=600,
                    loss=0.5,
                )
            yield span(
                now_us + 9_000,
                1_500,
                "learner.step",
                actor="learner",
                step=step,
                version=step,
                loss=1 / step,
                lr=1e-4,
                num_rollouts=_PER_STEP,
                staleness_max=2,
                staleness_mean=draw.random(),
                ages=[1] * 128,
                rollout_ids=scored,
            )
            yield span(now_us + 9_900, 800, "weights.push", actor="weight_syncer", version=step)
            yield fact(now_us + 9_950, "weights.live", actor="weight_syncer", version=step)
            scored = []
            written += _PER_STEP // 8 + 3


def fact(at_us: int, event: str, **fields: object) -> dict[str, Any]:
    t = (_BEGIN + timedelta(microseconds=at_us)).isoformat(timespec="microseconds")
    return {"t": t, "event": event, "level": "info", "run": "bench", "node": "0", **fields}


def span(end_us: int, dur_us: int, event: str, **fields: object) -> dict[str, Any]:
    start_ns = _UPTIME_NS + (end_us - dur_us) * 1000
    return fact(end_us, event, kind="span", **fields, outcome="ok", start_ns=start_ns, dur_us=dur_us)


def write_log(path: Path, num_lines: int) -> int:
    """At least so many lines; returns how many."""
    encode = msgspec.json.Encoder().encode
    written = 0
    with path.open("wb", buffering=1 << 20) as log:
        for line in lines(num_lines):
            log.write(encode(line) + b"\n")
            written += 1
    return written


def add_lines_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lines", type=int, default=1_000_000)


def report_on(command: Sequence[str], *, bench: str, num_lines: int) -> Report:
    """Run ``python -m`` ``command``, the only child of this process, and say what it took and whether that is within
    the limits."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", *command], check=False, capture_output=True, text=True)
    wall_s = time.perf_counter() - began
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        return Report(bench=bench, rows=(), failures=(done.stderr.strip(),))
    load = f"a log of {num_lines:,} lines"
    peak_mib = used.ru_maxrss / 1024
    return Report(
        bench=bench,
        rows=(
            Row(load=load, contender=OURS, value=wall_s, unit="s"),
            Row(load=load, contender=OURS, value=used.ru_utime + used.ru_stime, unit="CPU s"),
            Row(load=load, contender=OURS, value=peak_mib, unit="MiB at the peak"),
        ),
        targets=(
            Target(what=load, found=wall_s, bound=LIMIT_S, at_most=True, unit="s"),
            Target(what=load, found=peak_mib, bound=LIMIT_MIB, at_most=True, unit="MiB"),
        ),
    )
