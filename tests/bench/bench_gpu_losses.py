"""Losses on one CUDA device, beside the memory's and the matrix units' own speed, and beside plain autograd, TRL, Liger.

    python -m tests.bench.bench_gpu_losses [--sweep] [--json FILE] [--only SECTION …] [--profile FILE]

Needs torch and triton alone; rivals are measured where they are installed. Two ceilings are measured first: a copy
from device to device (bytes read and written per second), and a bfloat16 matrix product. A divergence of [T, V] logits
must read them, and read them again and write the gradient: 3 × T × V × 2 bytes over the copy's speed is its floor. The
floor of the fused head is its three matrix products, each made at once on the whole [T, V].

Medians over CUDA events, after a warm-up; every tensor is many times larger than the L2 cache, or rotated. Logits are
random and fresh for each call, the call's own launches lie behind that work, as they do behind a model's.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import itertools
import json
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ops import JSD, ForwardKL, ReverseKL, TeacherScores, divergence, linear_divergence

TOP_K = 64
NUM_ROWS, HIDDEN = 8192, 4096
VOCABULARIES = (151_936, 32_000)
OBJECTIVES = {"ForwardKL": ForwardKL(), "ReverseKL": ReverseKL(), "JSD(0.5)": JSD(0.5)}
SECTIONS = ("kernels", "few_rows", "divergence", "dense", "linear")


@dataclass(frozen=True, kw_only=True)
class Row:
    load: str
    contender: str
    ms: float
    of_floor: float | None = None
    """The floor's time over this: 1 is as fast as the hardware."""
    peak: float | None = None
    """Memory beyond what the caller holds, as a multiple of one [T, V] tensor of logits."""
    note: str = ""


class Table:
    """Collects and prints rows as they come."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        say(f"{'load':34} {'contender':40} {'ms':>9} {'of floor':>8} {'peak ×':>7}")

    def add(self, row: Row) -> None:
        self.rows.append(row)
        share = "" if row.of_floor is None else f"{100 * row.of_floor:.1f}%"
        peak = "" if row.peak is None else f"{row.peak:.2f}"
        say(f"{row.load:34} {row.contender:40} {row.ms:9.3f} {share:>8} {peak:>7} {row.note}".rstrip())


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def time_ms(run: Callable[[], object], *, before: Callable[[], object] = lambda: None, repeats: int = 20) -> float:
    """Median of the device's time. ``before`` is not timed."""
    for _ in range(3):
        before()
        run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        before()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def peak_bytes(run: Callable[[], object]) -> int:
    """Of one call, beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    there = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - there


class Ceilings:
    """What this card does when nothing else is asked of it."""

    def __init__(self) -> None:
        source = torch.empty(NUM_ROWS, VOCABULARIES[0], dtype=torch.bfloat16, device="cuda").normal_()
        target = torch.empty_like(source)
        ms = min(time_ms(lambda: target.copy_(source)) for _ in range(2))
        self.bytes_per_ms = 2 * source.nbytes / ms
        del source, target
        left, right = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
        out = torch.empty_like(left)
        ms = min(time_ms(lambda: torch.mm(left, right, out=out)) for _ in range(2))
        self.flops_per_ms = 2 * 8192**3 / ms
        say(f"copy {self.bytes_per_ms / 1e9:.3f} TB/s, bfloat16 product {self.flops_per_ms / 1e9:.0f} TFLOP/s\n")

    def share(self, num_bytes: float, ms: float) -> float:
        return num_bytes / self.bytes_per_ms / ms


def make_logits(num_rows: int, vocab_size: int) -> Tensor:
    """Spread as a model's: a few large, most far below."""
    logits = torch.empty(num_rows, vocab_size, dtype=torch.bfloat16, device="cuda").normal_(std=2.5)
    logits[:, :512] += 6.0
    return logits


def make_scores(num_rows: int, vocab_size: int) -> TeacherScores:
    """Ids partly among the student's most likely, partly anywhere, as a teacher's are."""
    random = torch.Generator("cuda").manual_seed(0)
    noise = torch.rand(num_rows, 1024, generator=random, device="cuda")
    column = noise.argsort(dim=1)[:, :TOP_K]
    ids = torch.where(column < 512, column, (column * 7919 + 12_345) % (vocab_size - 512) + 512)
    logprobs = torch.randn(num_rows, TOP_K, generator=random, device="cuda").log_softmax(dim=1) - 0.05
    return TeacherScores(
        top_ids=ids,
        top_logprobs=logprobs,
        sampled_ids=ids[:, 3].clone(),
        sampled_logprobs=logprobs[:, 3].clone(),
    )


def bench_kernels(table: Table, ceilings: Ceilings, *, sweep: bool) -> None:
    """The two passes alone. With ``sweep`` the best shape found is what later sections use."""
    import ops.listed
    from ops.triton_rows import EXPAND, PROGRAMS_PER_PROCESSOR, REDUCE, Shape, TritonRows

    load = f"{NUM_ROWS}×{VOCABULARIES[0]} bf16"
    logits, scores = make_logits(NUM_ROWS, VOCABULARIES[0]), make_scores(NUM_ROWS, VOCABULARIES[0])
    ids = torch.cat((scores.top_ids, scores.sampled_ids.masked_fill(scores.sampled_ids >= 0, -1).unsqueeze(1)), dim=1)
    out, rows = torch.empty_like(logits), torch.ones(NUM_ROWS, device="cuda")
    support_gradient = torch.zeros(ids.shape, device="cuda")

    def reduce_ms(kernel: TritonRows, k: int) -> float:
        return time_ms(lambda: kernel.reduce(logits, ids, num_columns=VOCABULARIES[0], k=k), repeats=10)

    def expand_ms(kernel: TritonRows, target: Tensor) -> float:
        return time_ms(
            lambda: kernel.expand(
                target,
                logits,
                ids,
                num_columns=VOCABULARIES[0],
                tail_shift=rows,
                tail_scale=rows,
                support_gradient=support_gradient,
            ),
            repeats=10,
        )

    best_reduce, best_expand, best_programs = REDUCE, EXPAND, PROGRAMS_PER_PROCESSOR
    if sweep:
        found: dict[Any, float] = {}
        for (block, num_warps), ahead in itertools.product(
            ((1024, 1), (1024, 2), (2048, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 16)),
            (False, True),
        ):
            shape = Shape(block=block, num_warps=num_warps, ahead=ahead)
            found[shape] = reduce_ms(TritonRows(reduce=shape), TOP_K)
            say(f"sweep reduce {shape}: {found[shape]:.3f} ms, {ceilings.share(logits.nbytes, found[shape]):.3f}")
        best_reduce = min(found, key=found.__getitem__)
        found = {}
        for (block, num_warps), stages in itertools.product(
            ((1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8), (8192, 16)), (1, 3)
        ):
            shape = Shape(block=block, num_warps=num_warps, stages=stages)
            found[shape] = expand_ms(TritonRows(expand=shape), out)
            say(f"sweep expand {shape}: {found[shape]:.3f} ms, {ceilings.share(2 * logits.nbytes, found[shape]):.3f}")
        best_expand = min(found, key=found.__getitem__)
        found = {}
        for programs in (16, 64, 128, 256, 512):
            kernel = TritonRows(reduce=best_reduce, expand=best_expand, programs_per_processor=programs)
            found[programs] = reduce_ms(kernel, TOP_K) + expand_ms(kernel, out)
            say(f"sweep programs {programs}: {found[programs]:.3f} ms reduce and expand")
        best_programs = min(found, key=found.__getitem__)
        say(f"best: {best_reduce} {best_expand} programs_per_processor={best_programs}\n")
    used = TritonRows(reduce=best_reduce, expand=best_expand, programs_per_processor=best_programs)
    setattr(ops.listed, "kernel_for", lambda device: used)  # noqa: B010
    for k in (0, TOP_K, 512):
        ms = reduce_ms(used, k)
        table.add(
            Row(load=load, contender=f"reduce, k={k}", ms=ms, of_floor=ceilings.share(logits.nbytes, ms))
        )
    for name, target in (("expand", out), ("expand in place", logits)):
        ms = expand_ms(used, target)
        table.add(Row(load=load, contender=name, ms=ms, of_floor=ceilings.share(2 * logits.nbytes, ms)))


def bench_few_rows(table: Table, ceilings: Ceilings) -> None:
    """Rows that would leave most of the card idle if each had one program."""
    from ops.rows import kernel_for

    vocab_size = VOCABULARIES[0]
    kernel = kernel_for(torch.device("cuda"))
    for num_rows in (8, 64, 512):
        sets = [make_logits(num_rows, vocab_size) for _ in range(max(2, 2048 // num_rows))]
        ids = make_scores(num_rows, vocab_size).top_ids
        turn = itertools.cycle(sets)
        ms = time_ms(lambda turn=turn, ids=ids: kernel.reduce(next(turn), ids, num_columns=vocab_size, k=TOP_K))
        share = ceilings.share(sets[0].nbytes, ms)
        table.add(Row(load=f"{num_rows}×{vocab_size} bf16", contender="reduce, k=64", ms=ms, of_floor=share))


def bench_divergence(table: Table, ceilings: Ceilings, profile: Path | None) -> None:
    for vocab_size in VOCABULARIES:
        load = f"{NUM_ROWS}×{vocab_size} bf16 top-{TOP_K}"
        given, scores = make_logits(NUM_ROWS, vocab_size), make_scores(NUM_ROWS, vocab_size)
        leaf = torch.empty_like(given).requires_grad_()
        floor_bytes = 3 * given.nbytes

        def fresh(leaf: Tensor = leaf, given: Tensor = given) -> None:
            leaf.grad = None
            with torch.no_grad():
                leaf.copy_(given)

        def measure(
            name: str, run: Callable[[], object], *, fresh: Callable[[], None] = fresh, repeats: int = 20, note: str = ""
        ) -> None:
            fresh()
            peak = peak_bytes(run) / given.nbytes
            ms = time_ms(run, before=fresh, repeats=repeats)
            share = ceilings.share(floor_bytes, ms)
            table.add(Row(load=load, contender=name, ms=ms, of_floor=share, peak=peak, note=note))

        for (name, objective), inplace in itertools.product(OBJECTIVES.items(), (False, True)):

            def ours(objective: Any = objective, inplace: bool = inplace) -> None:
                _backward(divergence(objective, leaf, scores, inplace=inplace).values.sum())

            measure(f"ours {name}{' in place' if inplace else ''}", ours)
            if profile is not None and name == "ForwardKL" and not inplace and vocab_size == VOCABULARIES[0]:
                write_profile(ours, fresh, profile)
        for name, rival, note in rivals_on_scores(leaf, scores):
            _tried(table, load, name, lambda name=name, rival=rival, note=note: measure(name, rival, repeats=5, note=note))
        del given, leaf, fresh, measure
        torch.cuda.empty_cache()


def bench_dense(table: Table, ceilings: Ceilings) -> None:
    """The teacher's logits too: read both twice, write one gradient."""
    num_rows = 2048  # what TRL's copies fit into
    for vocab_size in VOCABULARIES:
        load = f"{num_rows}×{vocab_size} bf16 dense"
        given, teacher = make_logits(num_rows, vocab_size), make_logits(num_rows, vocab_size)
        leaf = torch.empty_like(given).requires_grad_()
        floor_bytes = 5 * given.nbytes

        def fresh(leaf: Tensor = leaf, given: Tensor = given) -> None:
            leaf.grad = None
            with torch.no_grad():
                leaf.copy_(given)

        def measure(name: str, run: Callable[[], object], note: str = "", given: Tensor = given) -> None:
            fresh()
            peak = peak_bytes(run) / given.nbytes
            ms = time_ms(run, before=fresh, repeats=5)
            share = ceilings.share(floor_bytes, ms)
            table.add(Row(load=load, contender=name, ms=ms, of_floor=share, peak=peak, note=note))

        for name, objective in OBJECTIVES.items():
            measure(
                f"ours {name}",
                lambda objective=objective: _backward(divergence(objective, leaf, teacher).values.sum()),
            )
        for name, rival, note in rivals_on_logits(leaf, teacher):
            _tried(table, load, name, lambda name=name, rival=rival, note=note: measure(name, rival, note))
        torch.cuda.empty_cache()


def bench_linear(table: Table, ceilings: Ceilings) -> None:
    for vocab_size in VOCABULARIES:
        load = f"{NUM_ROWS}×{HIDDEN}×{vocab_size} bf16 top-{TOP_K}"
        scores = make_scores(NUM_ROWS, vocab_size)
        hidden = torch.randn(NUM_ROWS, HIDDEN, device="cuda").bfloat16().requires_grad_()
        weight = (torch.randn(vocab_size, HIDDEN, device="cuda") * 0.04).bfloat16().requires_grad_()
        logits_bytes = NUM_ROWS * vocab_size * 2

        def fresh(hidden: Tensor = hidden, weight: Tensor = weight) -> None:
            hidden.grad = weight.grad = None

        products_ms = three_products_ms(hidden.detach(), weight.detach())
        rate = 6 * NUM_ROWS * HIDDEN * vocab_size / products_ms / 1e9
        table.add(
            Row(load=load, contender="three products", ms=products_ms, of_floor=1.0, note=f"{rate:.0f} TFLOP/s")
        )

        def measure(
            name: str, run: Callable[[], object], repeats: int = 5, note: str = "", floor: float = products_ms
        ) -> None:
            fresh()
            gradients = (hidden.numel() + weight.numel()) * 2
            peak = (peak_bytes(run) - gradients) / logits_bytes
            ms = time_ms(run, before=fresh, repeats=repeats)
            note = note or f"{ms / floor:.3f}× the products"
            table.add(Row(load=load, contender=name, ms=ms, of_floor=floor / ms, peak=peak, note=note))

        for block_rows in (512, 1024, 2048, 4096):
            measure(
                f"ours ForwardKL, block_rows={block_rows}",
                lambda block_rows=block_rows: _backward(
                    linear_divergence(ForwardKL(), hidden, weight, scores, block_rows=block_rows).values.sum()
                ),
            )
        for name, objective in OBJECTIVES.items():
            measure(
                f"ours {name}, default blocks",
                lambda objective=objective: _backward(
                    linear_divergence(objective, hidden, weight, scores).values.sum()
                ),
            )
        for name, rival, note in rivals_on_hidden(hidden, weight, scores):
            _tried(table, load, name, lambda name=name, rival=rival, note=note: measure(name, rival, 2, note))
        del hidden, weight, fresh, measure
        torch.cuda.empty_cache()


def three_products_ms(hidden: Tensor, weight: Tensor) -> float:
    logits = hidden @ weight.t()
    hidden_grad, weight_grad = torch.empty_like(hidden), torch.empty_like(weight)

    def products() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=hidden_grad)
        torch.mm(logits.t(), hidden, out=weight_grad)

    return time_ms(products, repeats=5)


Rival = tuple[str, Callable[[], object], str]


def rivals_on_scores(leaf: Tensor, scores: TeacherScores) -> Iterator[Rival]:
    def autograd() -> None:
        _backward(naive_forward_kl(leaf, scores).sum())

    yield "plain autograd ForwardKL", autograd, ""


def rivals_on_logits(leaf: Tensor, teacher: Tensor) -> Iterator[Rival]:
    """JSD(0.5), each as its authors call it."""
    trl = functions_of("trl", "experimental/gkd/gkd_trainer.py", ("generalized_jsd_loss",))
    if trl is None:
        say("TRL is not installed: not measured")
    else:
        for dtype in (torch.bfloat16, torch.float32):
            yield (
                f"TRL generalized_jsd_loss, {str(dtype)[6:]}",
                lambda dtype=dtype: _backward(
                    trl["generalized_jsd_loss"](leaf.to(dtype), teacher.to(dtype), beta=0.5, reduction="sum")
                ),
                "",
            )
    if importlib.util.find_spec("liger_kernel") is None:
        say("liger-kernel is not installed: not measured")
        return
    from liger_kernel.transformers.jsd import LigerJSD

    jsd = LigerJSD(beta=0.5)
    yield (
        "Liger JSD, float32 log_softmax",
        lambda: _backward(
            jsd(leaf.log_softmax(-1, dtype=torch.float32), teacher.log_softmax(-1, dtype=torch.float32))
        ),
        "",
    )
    yield "Liger JSD, bfloat16 log_softmax", lambda: _backward(jsd(leaf.log_softmax(-1), teacher.log_softmax(-1))), ""


def rivals_on_hidden(hidden: Tensor, weight: Tensor, scores: TeacherScores) -> Iterator[Rival]:
    def autograd() -> None:
        _backward(naive_forward_kl(hidden @ weight.t(), scores).sum())

    yield "plain autograd ForwardKL", autograd, ""
    file = "experimental/async_distillation/async_distillation_trainer.py"
    names = ("_chunked_jsd_loss", "_jsd_loss_chunk", "_add_tail_bucket", "_jsd_divergence")
    trl = functions_of("trl", file, names)
    if trl is None:
        say("TRL is not installed: not measured")
    else:

        def chunked() -> None:
            present = torch.ones_like(scores.top_ids, dtype=torch.bool)
            loss, *_ = trl["_chunked_jsd_loss"](
                hidden, weight, None, 1.0, None, scores.top_ids, scores.top_logprobs, present, 0.0, 1.0, True, None, 1, 256
            )
            _backward(loss)

        yield "TRL async _chunked_jsd_loss ForwardKL", chunked, ""
    if importlib.util.find_spec("liger_kernel") is None:
        say("liger-kernel is not installed: not measured")
        return
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    jsd = LigerFusedLinearJSD(jsd_beta=0.5)
    teacher_hidden, teacher_weight = torch.randn_like(hidden), torch.randn_like(weight) * 0.04
    yield (
        "Liger fused linear JSD",
        lambda: _backward(jsd(hidden, weight, teacher_hidden, teacher_weight, None)),
        "makes the teacher's product too: a quarter of its work",
    )


def naive_forward_kl(logits: Tensor, scores: TeacherScores) -> Tensor:
    """[T], as one writes it without thinking of memory; the sampled token is in the list."""
    log_q = logits.float().log_softmax(dim=1)
    support_log_q, log_p = log_q.gather(1, scores.top_ids), scores.top_logprobs
    tail_q = (1.0 - support_log_q.exp().sum(dim=1)).clamp(min=1e-12)
    tail_p = (1.0 - log_p.exp().sum(dim=1)).clamp(min=1e-12)
    return (log_p.exp() * (log_p - support_log_q)).sum(dim=1) + tail_p * (tail_p.log() - tail_q.log())


def functions_of(package: str, file: str, names: tuple[str, ...]) -> dict[str, Any] | None:
    """Functions as they stand in an installed package's file, without importing it and what it needs; None: not there."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    source = (Path(spec.origin).parent / file).read_text()
    namespace: dict[str, Any] = {"torch": torch, "F": functional, "Any": Any}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            node.decorator_list = []
            exec(textwrap.dedent(ast.unparse(node)), namespace)
    return namespace


def write_profile(run: Callable[[], object], before: Callable[[], object], path: Path) -> None:
    """Every kernel of one call with its time on the device, in the order of their sums."""
    from torch.profiler import ProfilerActivity, profile

    before()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        run()
        torch.cuda.synchronize()
    events = found.key_averages()
    path.write_text(events.table(sort_by="self_cuda_time_total", row_limit=80, max_name_column_width=90))
    on_device = [event for event in events if event.self_device_time_total > 0 and event.device_type.name == "CUDA"]
    total_us, count = sum(e.self_device_time_total for e in on_device), sum(e.count for e in on_device)
    say(f"profile of one call: {count} kernels, {total_us / 1000:.3f} ms on the device")
    for event in sorted(on_device, key=lambda e: -e.self_device_time_total)[:12]:
        say(f"  {event.self_device_time_total / 1000:8.3f} ms  {event.count:4}×  {event.key[:90]}")


def _backward(value: Tensor) -> None:
    torch.autograd.backward(value)


def _tried(table: Table, load: str, name: str, measure: Callable[[], None]) -> None:
    """A rival may not fit or not run here; that is said and is no fault of ours."""
    try:
        measure()
    except (RuntimeError, ImportError, TypeError, AttributeError) as error:  # OutOfMemoryError is a RuntimeError
        say(f"{load:34} {name:40} not measured: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="try tile shapes, and use the best")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--json", type=Path, help="write all rows there")
    parser.add_argument("--profile", type=Path, help="write the kernels of one call there")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        say("no CUDA device: nothing to measure here")
        return 0
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    ceilings, table = Ceilings(), Table()
    sections: dict[str, Callable[[], None]] = {
        "kernels": lambda: bench_kernels(table, ceilings, sweep=options.sweep),
        "few_rows": lambda: bench_few_rows(table, ceilings),
        "divergence": lambda: bench_divergence(table, ceilings, options.profile),
        "dense": lambda: bench_dense(table, ceilings),
        "linear": lambda: bench_linear(table, ceilings),
    }
    for name in SECTIONS:
        if name in options.only:
            sections[name]()
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
