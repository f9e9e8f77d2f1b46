"""What it costs to get a version out of Megatron's ranks, and in again, beside a plain copy of the same bytes.

    python -m tests.bench.bench_export [--quick]

A Llama of 42 million weights in float32 is trained by real ranks, as a run starts them. *Export* is a whole version out
of the ranks and into tensors of this process, bucket by bucket, as the torch generator takes it; the plain copy moves
the same bytes once between tensors of one process. *Load* is ``load_hf`` of a rank against reading the file's bytes.
*Broadcast* is a version from one process to another over gloo. CPU time of all processes that take part, the least of
several turns; a ratio is of the two in one process run. Wall time is shown beside it: ranks copy at the same time.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import structlog
import torch
from torch import Tensor

from engine.megatron_config import MegatronConfig
from engine.objective_config import ObjectiveConfig
from engine.recipe import LearnerConfig, StudentConfig
from engine.training.export import buckets, named_tensors
from engine.training.megatron import MegatronTrainer
from engine.training.student_files import WeightFiles
from engine.transport.tensor_plane import WeightReceiver, WeightSender
from tests.bench.process_clock import cpu_s
from tests.bench.report import OURS, Report, Row, Target, add_options, finish, progress

BUCKET_BYTES = 32 << 20
LAYOUTS: dict[str, dict[str, Any]] = {
    "1 rank": {},
    "tensor parallel 2": {"tensor_parallel": 2},
    "pipeline parallel 2": {"pipeline_parallel": 2},
}
LIMIT = 3.0
"""One copy into the buffer, one out of it, and what ranks and node say to each other."""


class Cost(NamedTuple):
    cpu_s: float
    wall_s: float


def least(action: Callable[[], object], *, turns: int, pids: Sequence[int] = ()) -> Cost:
    """Of all turns, CPU time and wall time each; ``pids``: processes that work for this one."""
    pids = [os.getpid(), *pids]
    costs = []
    for _ in range(turns):
        start, before = time.perf_counter(), sum(map(cpu_s, pids))
        action()
        costs.append(Cost(sum(map(cpu_s, pids)) - before, time.perf_counter() - start))
    return Cost(min(cost.cpu_s for cost in costs), min(cost.wall_s for cost in costs))


def make_student(folder: Path) -> Path:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)  # type: ignore[no-untyped-call]
    return folder


def load_weights(folder: Path) -> list[tuple[str, Tensor]]:
    from transformers import AutoModelForCausalLM

    return [(n, t.clone()) for n, t in named_tensors(AutoModelForCausalLM.from_pretrained(folder))]


def into(targets: dict[str, Tensor], version: Any) -> None:
    for bucket in version:
        for name, tensor in zip(bucket.names, bucket.tensors, strict=True):
            targets[name].copy_(tensor)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_export", description=__doc__)
    add_options(parser)
    options = parser.parse_args(arguments)
    turns = 3 if options.quick else 9
    torch.set_num_threads(1)
    # What ranks log is no part of the report.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    with tempfile.TemporaryDirectory() as root:
        return finish(measure(Path(root), turns=turns, is_quick=options.quick), as_json=options.json)


def measure(root: Path, *, turns: int, is_quick: bool) -> Report:
    folder = make_student(root / "student")
    weights = load_weights(folder)
    targets = {name: torch.zeros_like(tensor) for name, tensor in weights}
    num_bytes = sum(tensor.numel() * tensor.element_size() for _, tensor in weights)
    rows: list[Row] = []
    targets_met: list[Target] = []

    def plain() -> None:
        for name, tensor in weights:
            targets[name].copy_(tensor)

    def row(load: str, who: str, cost: Cost, ours: Cost | None = None) -> None:
        ratio = None if ours is None else cost.cpu_s / ours.cpu_s
        rows.append(Row(load=load, contender=who, value=cost.cpu_s * 1e3, unit="ms CPU", ratio=ratio))
        rows.append(Row(load=load, contender=f"{who}, wall", value=cost.wall_s * 1e3, unit="ms"))

    for name, layout in LAYOUTS.items():
        if is_quick and name == "pipeline parallel 2":
            continue
        progress(f"export, {name}")
        trainer = make_trainer(folder, root / "logs", layout)
        trainer.start()
        try:
            into(targets, trainer.export(bucket_bytes=BUCKET_BYTES))  # memory is taken
            assert all(targets[n].equal(t) for n, t in weights), "what came out is not what went in"
            ours = least(
                lambda trainer=trainer: into(targets, trainer.export(bucket_bytes=BUCKET_BYTES)),  # type: ignore[misc]
                turns=turns,
                pids=trainer.rank_pids,
            )
        finally:
            trainer.stop()
        copy = least(plain, turns=turns)
        row(f"export, {name}", OURS, ours)
        row(f"export, {name}", "a plain copy", copy, ours)
        targets_met.append(
            Target(
                what=f"export, {name}: a plain copy's CPU time",
                found=ours.cpu_s / copy.cpu_s,
                bound=LIMIT,
                at_most=True,
            )
        )

    progress("load")
    with WeightFiles(folder) as files:
        names = sorted(files.names)
        regions = {name: tuple(slice(0, size) for size in files.shape(name)) for name in names}
        ours = least(lambda: [targets[name].copy_(files.read(name, regions[name])) for name in names], turns=turns)
    read = least((folder / "model.safetensors").read_bytes, turns=turns)
    row("load, all slices of a folder", OURS, ours)
    row("load, all slices of a folder", "read the file", read, ours)

    progress("broadcast")
    broadcast = least_broadcast(weights, targets, turns=turns)
    copy = least(plain, turns=turns)
    row("broadcast over gloo to one process", OURS, broadcast)
    row("broadcast over gloo to one process", "a plain copy", copy, broadcast)
    return Report(
        bench="export",
        rows=tuple(rows),
        targets=tuple(targets_met),
        notes=(f"a version is {num_bytes / 1e6:.0f} MB, in buckets of {BUCKET_BYTES >> 20} MiB",),
    )


def make_trainer(folder: Path, logs: Path, layout: dict[str, Any]) -> MegatronTrainer:
    return MegatronTrainer(
        config=LearnerConfig(backend="megatron", megatron=MegatronConfig(dtype="float32", **layout)),
        student=StudentConfig(path=str(folder)),
        objective=ObjectiveConfig(),
        steps=1,
        folder=logs,
    )


def least_broadcast(weights: list[tuple[str, Tensor]], targets: dict[str, Tensor], *, turns: int) -> Cost:
    """Sender and receiver are two threads of this process, each with sockets of its own."""
    cpu = torch.device("cpu")
    sender = WeightSender(host="127.0.0.1", num_receivers=1, device=cpu)

    def receive() -> None:
        receiver = WeightReceiver(sender.meeting, rank=1, device=cpu)
        for _ in range(turns + 1):
            into(targets, receiver.receive())
        receiver.close()

    def version() -> Any:
        found: Any = buckets(weights, bucket_bytes=BUCKET_BYTES)
        return found

    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(receive)
        sender.join()
        sender.send(version())  # memory is taken
        cost = least(lambda: sender.send(version()), turns=turns)
        receiving.result()
    sender.close()
    return cost


if __name__ == "__main__":
    sys.exit(main())
