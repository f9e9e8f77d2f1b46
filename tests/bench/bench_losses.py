"""Objectives beside the memory's speed, and the fused head beside its matrix products and its rivals.

    python -m tests.bench.bench_losses [--quick] [--json]

The floor of a divergence is to read the logits once and to write one gradient: ``copy_`` from one tensor to another
that is there already. The floor of the fused head is its three matrix products, for all rows at once. Seconds are CPU
time of one thread, the shortest of several turns, floor and ours in turn in one process; every process gets the same
allocator settings. Memory is the peak of the resident set beyond what was there before the call, after one call that
loads code, in a process of its own whose allocator gives back what is freed: so it counts all that is touched.

TRL's and Liger's losses run in TRL's environment (see ``bench_end_to_end``), on the same numbers where they can take a
list of the teacher's, and on a teacher's hidden states and head of the same size where they cannot.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from ops import JSD, ForwardKL, Objective, ReverseKL, TeacherScores, divergence, linear_divergence_with_gradients
from tests.bench.end_to_end.trl_environment import TrlMissing, python_with_trl
from tests.bench.report import OURS, Report, Row, Target, add_options, fair_environment, finish, progress

LIGER = "0.8.5"
NUM_ROWS, TOP_K = 1024, 64
HEAD_ROWS, HEAD_WIDTH, HEAD_VOCAB, RIVALS_BLOCK = 512, 256, 32_000, 128
OBJECTIVES: dict[str, Objective] = {"forward KL": ForwardKL(), "reverse KL": ReverseKL(), "JSD": JSD()}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SPEED_BOUND = {"bf16": 2.6, "fp32": 2.2}

FLOOR, PLAIN, TRL_LISTED, TRL_DENSE, LIGER_DENSE = (
    "floor",
    "plain autograd",
    "TRL async chunked, top-k",
    "TRL chunked, dense",
    "Liger chunked JSD, dense",
)


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement, for a process of its own."""

    load: str
    """"rows" (a divergence from logits) or "head"."""
    contenders: tuple[str, ...]
    vocab_size: int = HEAD_VOCAB
    dtype: str = "fp32"
    objective: str = "forward KL"
    turns: int = 5
    memory: bool = False
    """Bytes at the peak instead of seconds."""


def make_scores(logits: Tensor, seed: int) -> TeacherScores:
    """A teacher whose logits are the student's and noise, a block of rows at a time."""
    random = torch.Generator().manual_seed(seed)
    ids, logprobs = [], []
    for rows in torch.split(logits, 64):
        teacher = (rows.float() + torch.randn(rows.shape, generator=random)).log_softmax(dim=1)
        top = teacher.topk(TOP_K, dim=1)
        ids.append(top.indices)
        logprobs.append(top.values)
    top_ids, top_logprobs = torch.cat(ids), torch.cat(logprobs)
    return TeacherScores(
        top_ids=top_ids, top_logprobs=top_logprobs, sampled_ids=top_ids[:, 0], sampled_logprobs=top_logprobs[:, 0]
    )


def rows_contenders(job: Job) -> dict[str, Callable[[], object]]:
    random = torch.Generator().manual_seed(0)
    dtype, objective = DTYPES[job.dtype], OBJECTIVES[job.objective]
    logits = torch.empty((NUM_ROWS, job.vocab_size), dtype=dtype)
    for rows in torch.split(logits, 64):
        rows.copy_(3.0 * torch.randn(rows.shape, generator=random))
    scores = make_scores(logits, seed=1)
    out = None if job.memory else torch.empty_like(logits)

    def floor() -> None:
        assert out is not None
        out.copy_(logits)

    def ours(inplace: bool) -> None:
        # A view, so that the gradient of the tensor that stays is not among what is measured.
        leaf = logits.detach().requires_grad_()
        values = divergence(objective, leaf, scores, inplace=inplace).values
        torch.autograd.grad(values.sum(), leaf)

    def plain() -> None:
        leaf = logits.detach().requires_grad_()
        log_q = leaf.float().log_softmax(dim=1).gather(1, scores.top_ids)
        p = scores.top_logprobs.exp()
        p_tail = (1.0 - p.sum(dim=1)).clamp(min=1e-9)
        tail = torch.log1p(-log_q.exp().sum(dim=1).clamp(max=1.0 - 1e-6))
        values = (p * (scores.top_logprobs - log_q)).sum(dim=1) + p_tail * (p_tail.log() - tail)
        torch.autograd.grad(values.sum(), leaf)

    return {
        FLOOR: floor,
        OURS: lambda: ours(inplace=False),
        f"{OURS}, in place": lambda: ours(inplace=True),
        PLAIN: plain,
    }


def head_contenders(job: Job) -> dict[str, Callable[[], object]]:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(HEAD_ROWS, HEAD_WIDTH, generator=random)
    head = 0.2 * torch.randn(job.vocab_size, HEAD_WIDTH, generator=random)
    teacher_hidden = hidden + 0.3 * torch.randn(hidden.shape, generator=random)
    scores = make_scores(hidden @ head.t(), seed=1)
    objective = OBJECTIVES[job.objective]
    hidden_grad, head_grad = torch.zeros_like(hidden), torch.zeros_like(head)
    logits = None if job.memory else torch.empty(HEAD_ROWS, job.vocab_size)

    def floor() -> None:
        assert logits is not None
        torch.mm(hidden, head.t(), out=logits)
        torch.mm(logits, head, out=hidden_grad)
        head_grad.addmm_(logits.t(), hidden)

    def ours() -> None:
        linear_divergence_with_gradients(objective, hidden, head, scores, hidden_grad=hidden_grad, head_grad=head_grad)

    def leaves() -> tuple[Tensor, Tensor]:
        """Whose gradients are the buffers that ours get, too."""
        mine, weight = hidden.detach().requires_grad_(), head.detach().requires_grad_()
        mine.grad, weight.grad = hidden_grad, head_grad
        return mine, weight

    def plain() -> None:
        mine, weight = leaves()
        log_q = (mine @ weight.t()).log_softmax(dim=1).gather(1, scores.top_ids)
        p = scores.top_logprobs.exp()
        p_tail = (1.0 - p.sum(dim=1)).clamp(min=1e-9)
        tail = torch.log1p(-log_q.exp().sum(dim=1).clamp(max=1.0 - 1e-6))
        values = (p * (scores.top_logprobs - log_q)).sum(dim=1) + p_tail * (p_tail.log() - tail)
        torch.autograd.backward(values.sum())

    def trl_listed() -> None:
        from trl.experimental.async_distillation.async_distillation_trainer import _chunked_jsd_loss

        mine, weight = leaves()
        mask = torch.ones_like(scores.top_ids, dtype=torch.bool)
        listed = scores.top_ids, scores.top_logprobs, mask
        loss, *_ = _chunked_jsd_loss(mine, weight, None, 1.0, None, *listed, 0.0, 1.0, True, None, 1, RIVALS_BLOCK)
        torch.autograd.backward(loss)

    def trl_dense() -> None:
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        mine, weight = leaves()
        mask = torch.ones(1, HEAD_ROWS)
        loss, *_ = _chunked_divergence_loss(mine[None], teacher_hidden[None], weight, head, mask, 0.5)
        torch.autograd.backward(loss)

    def liger_dense() -> None:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        mine, weight = leaves()
        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False, chunk_size=RIVALS_BLOCK
        )
        labels = torch.zeros(HEAD_ROWS, dtype=torch.long)
        torch.autograd.backward(loss(mine, weight, teacher_hidden, head, labels))

    return {
        FLOOR: floor,
        OURS: ours,
        PLAIN: plain,
        TRL_LISTED: trl_listed,
        TRL_DENSE: trl_dense,
        LIGER_DENSE: liger_dense,
    }


def work(job: Job) -> dict[str, float]:
    """CPU seconds, or bytes, of each contender."""
    torch.set_num_threads(1)
    known = rows_contenders(job) if job.load == "rows" else head_contenders(job)
    chosen = {name: known[name] for name in job.contenders}
    if job.memory:
        return {name: _peak_bytes(run) for name, run in chosen.items()}
    best = dict.fromkeys(chosen, float("inf"))
    for turn in range(job.turns + 1):
        for name, run in chosen.items():
            began = time.process_time()
            run()
            if turn > 0:  # the first one warms up
                best[name] = min(best[name], time.process_time() - began)
    return best


def _peak_bytes(run: Callable[[], object]) -> float:
    run()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins again from here
    before = _status_kib("VmRSS")
    run()
    return (_status_kib("VmHWM") - before) * 1024.0


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def ask(job: Job, *, python: str = sys.executable) -> dict[str, float]:
    """The job in a process of its own.

    Raises:
        RuntimeError: it failed.
    """
    environment = fair_environment() | {"TRL_EXPERIMENTAL_SILENCE": "1"}
    if job.memory:
        # What is freed is given back at once, so that all that is touched is new.
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment["PYTHONPATH"] = os.getcwd()
    command = [python, "-m", "tests.bench.bench_losses", "--job", msgspec.json.encode(job).decode()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it said nothing"])[-1])
    return msgspec.json.decode(done.stdout.rpartition("\n")[2] or done.stdout, type=dict[str, float])


def python_with_rivals() -> str:
    """TRL's environment, with Liger in it.

    Raises:
        TrlMissing: one of them cannot be had.
    """
    python = str(python_with_trl())
    if subprocess.run([python, "-c", "import liger_kernel"], capture_output=True, check=False).returncode != 0:
        command = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        done = subprocess.run([*command, f"liger-kernel=={LIGER}"], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise TrlMissing(f"Liger {LIGER} cannot be installed")
    return python


def measure_rows(quick: bool, rows: list[Row], targets: list[Target]) -> None:
    for vocab_size in (32_000,) if quick else (32_000, 151_936):
        for dtype in DTYPES:
            for objective in ("forward KL",) if quick else tuple(OBJECTIVES):
                load = f"{objective}, top-{TOP_K}, {NUM_ROWS}×{vocab_size} {dtype}"
                progress(load)
                contenders: tuple[str, ...] = (FLOOR, OURS, f"{OURS}, in place")
                if objective == "forward KL" and vocab_size == 32_000:
                    contenders += (PLAIN,)
                job = Job(
                    load="rows", contenders=contenders, vocab_size=vocab_size, dtype=dtype, objective=objective,
                    turns=3 if quick else 7,
                )  # fmt: skip
                seconds = ask(job)
                for name, found in seconds.items():
                    ratio = None if name.startswith(OURS) else found / seconds[OURS]
                    rows.append(Row(load=load, contender=name, value=found * 1e3, unit="CPU ms", ratio=ratio))
                found = seconds[OURS] / seconds[FLOOR]
                targets.append(Target(what=f"{load}, × the floor", found=found, bound=SPEED_BOUND[dtype], at_most=True))
            measure_rows_memory(vocab_size, dtype, rows, targets)


def measure_rows_memory(vocab_size: int, dtype: str, rows: list[Row], targets: list[Target]) -> None:
    load = f"forward KL, {NUM_ROWS}×{vocab_size} {dtype}: peak beyond the logits"
    size = NUM_ROWS * vocab_size * DTYPES[dtype].itemsize
    contenders = (OURS, f"{OURS}, in place") + ((PLAIN,) if vocab_size == 32_000 else ())
    for name in contenders:
        found = ask(Job(load="rows", contenders=(name,), vocab_size=vocab_size, dtype=dtype, memory=True))[name] / size
        rows.append(Row(load=load, contender=name, value=found, unit="× the logits"))
        if name != PLAIN:
            bound = 1.1 if name.endswith("in place") else 2.1
            targets.append(Target(what=f"{load}, {name}", found=found, bound=bound, at_most=True))


def measure_head(quick: bool, rows: list[Row], targets: list[Target], notes: list[str]) -> None:
    load = f"head, {HEAD_ROWS}×{HEAD_WIDTH}×{HEAD_VOCAB} fp32, top-{TOP_K}"
    progress(load)
    rivals: Any = (PLAIN,)
    python = sys.executable
    try:
        python = python_with_rivals()
        rivals = (PLAIN, TRL_LISTED, TRL_DENSE, LIGER_DENSE)
    except TrlMissing as missing:
        notes.append(f"TRL and Liger are not here: {missing}.")
    seconds = ask(Job(load="head", contenders=(FLOOR, OURS, *rivals), turns=2 if quick else 5), python=python)
    for name, found in seconds.items():
        ratio = None if name == OURS else found / seconds[OURS]
        rows.append(Row(load=load, contender=name, value=found * 1e3, unit="CPU ms", ratio=ratio))
    found = seconds[OURS] / seconds[FLOOR]
    targets.append(Target(what=f"{load}, × its matrix products", found=found, bound=1.1, at_most=True))
    size = HEAD_ROWS * HEAD_VOCAB * 4
    peaks = {
        name: ask(Job(load="head", contenders=(name,), memory=True), python=python)[name] / size
        for name in (OURS, *rivals)
    }
    for name, peak in peaks.items():
        ratio = None if name == OURS else peak / peaks[OURS]
        rows.append(
            Row(load=f"{load}: peak beyond the gradients", contender=name, value=peak, unit="× logits", ratio=ratio)
        )
    targets.append(
        Target(what=f"{load}, peak beyond the gradients, × logits", found=peaks[OURS], bound=0.25, at_most=True)
    )
    for name in rivals:
        targets.append(Target(what=f"{load}, speed against {name}", found=seconds[name] / seconds[OURS], bound=1.0))
        targets.append(Target(what=f"{load}, memory against {name}", found=peaks[name] / peaks[OURS], bound=1.0))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", default=None, help="one measurement, as this program asks itself for")
    add_options(parser)
    options = parser.parse_args()
    if options.job is not None:
        found = work(msgspec.json.decode(options.job, type=Job))
        sys.stdout.write("\n" + msgspec.json.encode(found).decode())
        return 0
    rows: list[Row] = []
    targets: list[Target] = []
    notes = ["The floor reads the logits once and writes one gradient into a tensor that is there already."]
    measure_rows(options.quick, rows, targets)
    measure_head(options.quick, rows, targets, notes)
    report = Report(bench="losses", rows=tuple(rows), targets=tuple(targets), notes=tuple(notes))
    return finish(report, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
