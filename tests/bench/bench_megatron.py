"""What the node adds to a step on Megatron's ranks, and what it costs to send a version out.

    python -m tests.bench.bench_megatron [--quick] [--steps N]

*step*: the same rollouts through the trainer as the node has it (planned, encoded, written to shared memory, answered)
and through a loop inside the rank that calls Megatron with work that it holds already; the two take turns. *export*:
all buckets of a version copied out of the rank's memory, beside one copy of the same bytes within this process. *sync*:
steps beside which a version leaves each time, as at a staleness of 1 and more: how long the optimizer waits for its
last bucket, when the loading takes a tenth of a step.

One rank: with more, ranks wait for each other's share of two cores, and that is what would be measured. Wall clock,
median over steps; run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from engine.megatron_config import MegatronConfig
from engine.objective_config import ObjectiveConfig
from engine.recipe import LearnerConfig, StudentConfig
from engine.training.megatron import MegatronTrainer
from engine.training.rank_plan import plan
from engine.training.rank_work import RankSettings
from engine.transport.rank_group import RankGroup
from engine.types import ScoredRollout
from teacher.protocol import Scores
from tests.bench.megatron_bare import BareLoop
from tests.bench.report import OURS, Report, Row, Target, add_options, finish, progress
from tests.engine.training.cases import make_scored
from tests.support.models import tiny_model

OVERHEAD_LIMIT = 1.05
BLOCKED_LIMIT = 0.02
COPY_SHARE = 0.1
"""Of a step, for which loading a version is made to last."""
BUDGET_TOKENS = 2048


class Pair:
    """The trainer, and the bare loop in a rank of its own, on the same student and rollouts."""

    def __init__(self, folder: Path, *, hidden: int, layers: int, num_calls: int) -> None:
        tiny_model(folder / "student", arch="qwen3", hidden=hidden, layers=layers, seed=1)
        learner = LearnerConfig(
            backend="megatron",
            micro_batch_tokens=BUDGET_TOKENS,
            megatron=MegatronConfig(dtype="float32", command_timeout_s=300.0),
        )
        student, objective = StudentConfig(path=str(folder / "student")), ObjectiveConfig()
        self.num_calls = num_calls
        self.rollouts: list[ScoredRollout[Scores]] = [
            make_scored(rollout_id=i, prompt=range(3, 35), response=range(40, 136), top_k=64)
            for i in range(BUDGET_TOKENS // 128)
        ]
        self.trainer = MegatronTrainer(
            config=learner, student=student, objective=objective, steps=10_000, folder=folder / "ranks"
        )
        (self._work,) = plan(
            self.rollouts, config=learner.megatron, budget=BUDGET_TOKENS, attention_length=12.0 * hidden
        )
        self._bare = RankGroup(
            name="bare",
            interface=BareLoop,
            factory="tests.bench.megatron_bare:make_bare",
            arguments={
                "settings": RankSettings(
                    learner=learner, student=student, objective=objective, num_steps=10_000, seed=0
                )
            },
            num_ranks=1,
            folder=folder / "bare",
            environment={"OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Pair:
        self.trainer.start()
        self._bare.start()
        self._bare.call("start", {})
        return self

    def __exit__(self, *_: object) -> None:
        self.trainer.stop()
        self._bare.close()

    def step(self) -> float:
        """Seconds."""
        began = time.perf_counter()
        self.passes()
        self.trainer.finish_step()
        return time.perf_counter() - began

    def passes(self) -> None:
        for _ in range(self.num_calls):
            self.trainer.accumulate(self.rollouts)

    def bare_step(self) -> float:
        ((seconds,),) = self._bare.call("bare_steps", {"work": self._work, "num_steps": 1, "num_calls": self.num_calls})
        return float(seconds)

    def export(self, take: Callable[[torch.Tensor], None]) -> int:
        """Bytes."""
        num_bytes = 0
        for bucket in self.trainer.export(bucket_bytes=16 << 20):
            for tensor in bucket.tensors:
                take(tensor)
                num_bytes += tensor.numel() * tensor.element_size()
        return num_bytes


def measure_steps(pair: Pair, num_steps: int) -> tuple[float, float]:
    """Median seconds of ours and of the bare loop, in turns."""
    ours: list[float] = []
    bare: list[float] = []
    for turn in range(num_steps + 1):
        pairs = ((pair.step, ours), (pair.bare_step, bare))
        for run, seconds in pairs if turn % 2 else reversed(pairs):
            taken = run()
            if turn > 0:  # the first one warms up
                seconds.append(taken)
    return statistics.median(ours), statistics.median(bare)


def measure_export(pair: Pair, num_turns: int) -> tuple[float, float, int]:
    """Median seconds of an export with its loading, and of one copy; bytes."""
    places: dict[int, torch.Tensor] = {}
    tensors: list[torch.Tensor] = []

    def load(tensor: torch.Tensor) -> None:
        key = len(tensors)
        places.setdefault(key, torch.empty_like(tensor)).copy_(tensor)
        tensors.append(places[key])

    exports, copies, others, num_bytes = [], [], list[torch.Tensor](), 0
    for turn in range(num_turns + 1):
        tensors.clear()
        began = time.perf_counter()
        num_bytes = pair.export(load)
        exported = time.perf_counter() - began
        others = others or [torch.empty_like(tensor) for tensor in tensors]
        began = time.perf_counter()
        for target, source in zip(others, tensors, strict=True):
            target.copy_(source)
        copied = time.perf_counter() - began
        if turn > 0:
            exports.append(exported)
            copies.append(copied)
    return statistics.median(exports), statistics.median(copies), num_bytes


def measure_sync(pair: Pair, num_steps: int, step_s: float) -> tuple[float, float]:
    """Share of a step for which the optimizer waited for a version to leave, and how much longer steps got."""
    waits, steps = [], []
    for _ in range(num_steps):
        began = time.perf_counter()
        leaving = threading.Thread(target=_leave_slowly, args=(pair, COPY_SHARE * step_s))
        leaving.start()
        pair.passes()
        ready = time.perf_counter()
        leaving.join()
        waits.append(time.perf_counter() - ready)
        pair.trainer.finish_step()
        steps.append(time.perf_counter() - began)
    return statistics.median(waits) / statistics.median(steps), statistics.median(steps) / step_s


def _leave_slowly(pair: Pair, at_least_s: float) -> None:
    """Copy a version, again and again until the time is over."""
    end = time.perf_counter() + at_least_s
    place: dict[tuple[int, ...], torch.Tensor] = {}

    def load(tensor: torch.Tensor) -> None:
        place.setdefault(tuple(tensor.shape), torch.empty_like(tensor)).copy_(tensor)

    pair.export(load)
    while time.perf_counter() < end:
        pair.export(load)


def run(*, num_steps: int, hidden: int, layers: int) -> Report:
    with tempfile.TemporaryDirectory() as folder, Pair(Path(folder), hidden=hidden, layers=layers, num_calls=2) as pair:
        progress("steps")
        ours_s, bare_s = measure_steps(pair, num_steps)
        progress("export")
        export_s, copy_s, num_bytes = measure_export(pair, num_steps)
        progress("sync")
        blocked, slower = measure_sync(pair, num_steps, ours_s)
    rows = (
        Row(load="step", contender=OURS, value=ours_s * 1e3, unit="ms"),
        Row(load="step", contender="bare loop in the rank", value=bare_s * 1e3, unit="ms", ratio=bare_s / ours_s),
        Row(load=f"export of {num_bytes / 2**20:.0f} MiB", contender=OURS, value=export_s * 1e3, unit="ms"),
        Row(
            load=f"export of {num_bytes / 2**20:.0f} MiB",
            contender="plain copy",
            value=copy_s * 1e3,
            unit="ms",
            ratio=copy_s / export_s,
        ),
        Row(load="sync beside a step", contender=f"{OURS}, optimizer waits", value=blocked * 100, unit="% of a step"),
        Row(load="sync beside a step", contender=f"{OURS}, steps take", value=slower, unit="× as long"),
    )
    targets = (
        Target(what="step beside the bare loop", found=ours_s / bare_s, bound=OVERHEAD_LIMIT, at_most=True),
        Target(
            what="share of a step that weight sync blocks", found=blocked, bound=BLOCKED_LIMIT, at_most=True, unit=""
        ),
    )
    return Report(bench="megatron", rows=rows, targets=targets)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_options(parser)
    parser.add_argument("--steps", type=int, default=15, metavar="N", help="of each kind")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    size = {"hidden": 128, "layers": 2} if options.quick else {"hidden": 256, "layers": 6}
    report = run(num_steps=3 if options.quick else options.steps, **size)
    return finish(report, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
