"""Losses on one CUDA device, beside the memory's and the matrix units' own speed, and beside autograd, TRL and Liger.

    python -m tests.bench.bench_gpu_losses [--sweep] [--json FILE] [--only SECTION …] [--profile FILE]

Needs torch and triton alone; rivals are measured where they are installed. Two ceilings are measured first: a copy
from device to device (bytes read and written per second), and a bfloat16 matrix product. A divergence of [T, V] logits
must read them, and read them again and write the gradient: 3 × T × V × 2 bytes over the copy's speed is its floor. The
floor of the fused head is its three matrix products, each made at once for all T.

Medians over CUDA events, after a warm-up; every tensor is many times larger than the L2 cache, or rotated. Inputs are
made new before each call, and the call's launches lie behind that work as in training they lie behind a model's.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

import ops.listed
import ops.rows
from ops import JSD, ForwardKL, Objective, ReverseKL, TeacherScores, divergence, linear_divergence
from ops.kernels import kernel_for
from tests.bench import gpu_rivals
from tests.bench.gpu_clock import Ceilings, Load, Row, Table, say, time_ms, write_profile

TOP_K = 64
NUM_ROWS, NUM_ROWS_DENSE, HIDDEN = 8192, 2048, 4096
VOCABULARIES = (151_936, 32_000)
OBJECTIVES: dict[str, Objective] = {"ForwardKL": ForwardKL(), "ReverseKL": ReverseKL(), "JSD(0.5)": JSD(0.5)}
SECTIONS = ("kernels", "few_rows", "divergence", "dense", "linear")


def make_logits(num_rows: int, vocab_size: int) -> Tensor:
    """Spread as a model's: a few large, most far below."""
    logits = torch.empty(num_rows, vocab_size, dtype=torch.bfloat16, device="cuda").normal_(std=2.5)
    logits[:, :512] += 6.0
    return logits


def make_scores(num_rows: int, vocab_size: int) -> TeacherScores:
    """Half of the ids among the student's most likely, half anywhere."""
    random = torch.Generator("cuda").manual_seed(0)
    column = torch.rand(num_rows, 1024, generator=random, device="cuda").argsort(dim=1)[:, :TOP_K]
    ids = torch.where(column < 512, column, (column * 7919) % (vocab_size - 512) + 512)
    logprobs = torch.randn(num_rows, TOP_K, generator=random, device="cuda").log_softmax(dim=1) - 0.05
    return TeacherScores(
        top_ids=ids,
        top_logprobs=logprobs,
        sampled_ids=ids[:, 3].clone(),
        sampled_logprobs=logprobs[:, 3].clone(),
    )


class Kernels:
    """The two passes on their own."""

    def __init__(self, ceilings: Ceilings) -> None:
        self.num_columns = VOCABULARIES[0]
        self.load = f"{NUM_ROWS}×{self.num_columns} bf16"
        self.logits = make_logits(NUM_ROWS, self.num_columns)
        self.out = torch.empty_like(self.logits)
        self.ids = torch.nn.functional.pad(make_scores(NUM_ROWS, self.num_columns).top_ids, (0, 1), value=-1)
        self.ones = torch.ones(NUM_ROWS, device="cuda")
        self.support_gradient = torch.zeros(self.ids.shape, device="cuda")
        self.floor_ms = ceilings.copy_ms(self.logits.nbytes)
        """To move the logits once."""

    def reduce_ms(self, kernel: ops.rows.RowKernel, *, k: int = TOP_K) -> float:
        return time_ms(lambda: kernel.reduce(self.logits, self.ids, num_columns=self.num_columns, k=k), repeats=10)

    def expand_ms(self, kernel: ops.rows.RowKernel, *, inplace: bool = False) -> float:
        return time_ms(
            lambda: kernel.expand(
                self.logits if inplace else self.out,
                self.logits,
                self.ids,
                num_columns=self.num_columns,
                tail_shift=self.ones,
                tail_scale=self.ones,
                support_gradient=self.support_gradient,
            ),
            repeats=10,
        )

    def sweep(self) -> None:
        """Shapes of tiles, one by one; what is best is what the rest of this program uses."""
        from ops.triton_rows import Shape, TritonRows

        reduce_ms = {}
        for (block, num_warps), ahead in itertools.product(
            ((1024, 1), (1024, 2), (2048, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 16)),
            (False, True),
        ):
            shape = Shape(block=block, num_warps=num_warps, ahead=ahead)
            reduce_ms[shape] = self.reduce_ms(TritonRows(reduce=shape))
            say(f"sweep reduce {shape}: {reduce_ms[shape]:.3f} ms, {self.floor_ms / reduce_ms[shape]:.3f}")
        best_reduce = min(reduce_ms, key=reduce_ms.__getitem__)
        expand_ms = {}
        for (block, num_warps), stages in itertools.product(
            ((1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8), (8192, 16)), (1, 3)
        ):
            shape = Shape(block=block, num_warps=num_warps, stages=stages)
            expand_ms[shape] = self.expand_ms(TritonRows(expand=shape))
            say(f"sweep expand {shape}: {expand_ms[shape]:.3f} ms, {2 * self.floor_ms / expand_ms[shape]:.3f}")
        best_expand = min(expand_ms, key=expand_ms.__getitem__)
        both_ms = {}
        for programs in (16, 64, 128, 256, 512):
            kernel = TritonRows(reduce=best_reduce, expand=best_expand, programs_per_processor=programs)
            both_ms[programs] = self.reduce_ms(kernel) + self.expand_ms(kernel)
            say(f"sweep programs_per_processor={programs}: {both_ms[programs]:.3f} ms for both")
        best = min(both_ms, key=both_ms.__getitem__)
        search_ms = {}
        for candidates, registers in itertools.product((16, 32, 64), (None, 128, 96, 80)):
            search_ms[candidates, registers] = self.reduce_ms(
                TritonRows(reduce=best_reduce, candidates_per_thread=candidates, search_registers=registers)
            )
            say(f"sweep {candidates} candidates and {registers} registers: {search_ms[candidates, registers]:.3f} ms")
        candidates, registers = min(search_ms, key=search_ms.__getitem__)
        found = TritonRows(
            reduce=best_reduce,
            expand=best_expand,
            programs_per_processor=best,
            candidates_per_thread=candidates,
            search_registers=registers,
        )
        say(f"best: {best_reduce}, {best_expand}, {best} programs per processor, {candidates} candidates per thread, ")
        say(f"      {registers} registers\n")
        setattr(ops.listed, "kernel_for", lambda device: found)  # noqa: B010

    def measure(self, table: Table) -> None:
        kernel = getattr(ops.listed, "kernel_for")(self.logits.device)  # noqa: B009
        for k in (0, TOP_K, 512):
            ms = self.reduce_ms(kernel, k=k)
            table.add(Row(load=self.load, contender=f"reduce, k={k}", ms=ms, of_floor=self.floor_ms / ms))
        for inplace in (False, True):
            ms = self.expand_ms(kernel, inplace=inplace)
            name = "expand in place" if inplace else "expand"
            table.add(Row(load=self.load, contender=name, ms=ms, of_floor=2 * self.floor_ms / ms))


def bench_few_rows(table: Table, ceilings: Ceilings, num_rows: int) -> None:
    """Rows that would leave most of the card idle if each had one program."""
    vocab_size = VOCABULARIES[0]
    kernel, ids = kernel_for(torch.device("cuda")), make_scores(num_rows, vocab_size).top_ids
    sets = [make_logits(num_rows, vocab_size) for _ in range(max(2, 2048 // num_rows))]
    turn = itertools.cycle(sets)
    ms = time_ms(lambda: kernel.reduce(next(turn), ids, num_columns=vocab_size, k=TOP_K))
    share = ceilings.copy_ms(sets[0].nbytes) / ms
    table.add(Row(load=f"{num_rows}×{vocab_size} bf16", contender="reduce, k=64", ms=ms, of_floor=share))


def bench_divergence(table: Table, ceilings: Ceilings, vocab_size: int, profile: Path | None) -> None:
    given, scores = make_logits(NUM_ROWS, vocab_size), make_scores(NUM_ROWS, vocab_size)
    leaf = torch.empty_like(given).requires_grad_()

    def fresh() -> None:
        leaf.grad = None
        leaf.detach().copy_(given)

    def ours(objective: Objective, inplace: bool) -> None:
        torch.autograd.backward(divergence(objective, leaf, scores, inplace=inplace).values.sum())

    load = Load(
        table=table,
        name=f"{NUM_ROWS}×{vocab_size} bf16 top-{TOP_K}",
        floor_ms=ceilings.copy_ms(3 * given.nbytes),
        logits_bytes=given.nbytes,
        fresh=fresh,
    )
    for (name, objective), inplace in itertools.product(OBJECTIVES.items(), (False, True)):
        load.measure(f"ours {name}{' in place' if inplace else ''}", functools.partial(ours, objective, inplace))
    if profile is not None:
        write_profile(functools.partial(ours, ForwardKL(), False), fresh, profile)
    for rival in gpu_rivals.on_scores(leaf, scores):
        load.try_to_measure(rival.name, rival.run, repeats=5, note=rival.note)


def bench_dense(table: Table, ceilings: Ceilings, vocab_size: int) -> None:
    """The teacher's logits as well: read both twice, write one gradient. Few rows, so that TRL's copies fit."""
    given, teacher = make_logits(NUM_ROWS_DENSE, vocab_size), make_logits(NUM_ROWS_DENSE, vocab_size)
    leaf = torch.empty_like(given).requires_grad_()

    def fresh() -> None:
        leaf.grad = None
        leaf.detach().copy_(given)

    def ours(objective: Objective) -> None:
        torch.autograd.backward(divergence(objective, leaf, teacher).values.sum())

    load = Load(
        table=table,
        name=f"{NUM_ROWS_DENSE}×{vocab_size} bf16 dense",
        floor_ms=ceilings.copy_ms(5 * given.nbytes),
        logits_bytes=given.nbytes,
        fresh=fresh,
        repeats=5,
    )
    for name, objective in OBJECTIVES.items():
        load.measure(f"ours {name}", functools.partial(ours, objective))
    for rival in gpu_rivals.on_logits(leaf, teacher):
        load.try_to_measure(rival.name, rival.run, repeats=5, note=rival.note)


def bench_linear(table: Table, vocab_size: int) -> None:
    scores = make_scores(NUM_ROWS, vocab_size)
    hidden = torch.randn(NUM_ROWS, HIDDEN, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(vocab_size, HIDDEN, device="cuda") * 0.04).bfloat16().requires_grad_()
    floor_ms = three_products_ms(hidden.detach(), weight.detach())
    torch.cuda.empty_cache()
    rate = 6 * NUM_ROWS * HIDDEN * vocab_size / floor_ms / 1e9
    name = f"{NUM_ROWS}×{HIDDEN}×{vocab_size} bf16"
    table.add(Row(load=name, contender="three products", ms=floor_ms, of_floor=1.0, note=f"{rate:.0f} TFLOP/s"))

    def fresh() -> None:
        hidden.grad = weight.grad = None

    def ours(objective: Objective, block_rows: int | None) -> None:
        found = (
            linear_divergence(objective, hidden, weight, scores)
            if block_rows is None
            else linear_divergence(objective, hidden, weight, scores, block_rows=block_rows)
        )
        torch.autograd.backward(found.values.sum())

    load = Load(
        table=table,
        name=name,
        floor_ms=floor_ms,
        logits_bytes=NUM_ROWS * vocab_size * 2,
        fresh=fresh,
        kept_bytes=hidden.nbytes + weight.nbytes,
        repeats=5,
    )
    for block_rows in (2048, 4096):
        load.measure(f"ours ForwardKL, block_rows={block_rows}", functools.partial(ours, ForwardKL(), block_rows))
    for objective_name, objective in OBJECTIVES.items():
        load.measure(f"ours {objective_name}", functools.partial(ours, objective, None))
    for rival in gpu_rivals.on_hidden(hidden, weight, scores):
        load.try_to_measure(rival.name, rival.run, repeats=2, note=rival.note)


def three_products_ms(hidden: Tensor, weight: Tensor) -> float:
    """z = h Wᵀ, dh = z W, dW = zᵀ h."""
    logits = hidden @ weight.t()
    hidden_grad, weight_grad = torch.empty_like(hidden), torch.empty_like(weight)

    def products() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=hidden_grad)
        torch.mm(logits.t(), hidden, out=weight_grad)

    return time_ms(products, repeats=5)


def run_section(section: str, table: Table, ceilings: Ceilings, *, sweep: bool, profile: Path | None) -> None:
    if section == "kernels":
        kernels = Kernels(ceilings)
        if sweep:
            kernels.sweep()
        kernels.measure(table)
    if section == "few_rows":
        for num_rows in (8, 64, 512):
            bench_few_rows(table, ceilings, num_rows)
    parts: dict[str, Callable[[int], None]] = {
        "divergence": lambda size: bench_divergence(
            table, ceilings, size, profile if size == VOCABULARIES[0] else None
        ),
        "dense": lambda size: bench_dense(table, ceilings, size),
        "linear": lambda size: bench_linear(table, size),
    }
    if section in parts:
        for vocab_size in VOCABULARIES:
            parts[section](vocab_size)
            torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="try shapes of tiles, and use the best")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--json", type=Path, help="write all rows there")
    parser.add_argument("--profile", type=Path, help="write the kernels of one call there")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        say("no CUDA device: nothing to measure here")
        return 0
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    ceilings = Ceilings()
    say(f"{ceilings}\n")
    table = Table()
    for section in SECTIONS:
        if section not in options.only:
            continue
        run_section(section, table, ceilings, sweep=options.sweep, profile=options.profile)
        torch.cuda.empty_cache()
        if options.json is not None:  # after each section: a later one may be cut off
            found = {
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "copy_tb_s": ceilings.bytes_per_ms / 1e9,
                "bf16_tflop_s": ceilings.flops_per_ms / 1e9,
                "rows": [asdict(row) for row in table.rows],
            }
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
