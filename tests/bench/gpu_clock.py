"""Time and memory of work on a CUDA device, beside the card's own ceilings. Needs torch alone."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

Work = Callable[[], object]


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
    """Collects rows and prints them as they come."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        say(f"{'load':32} {'contender':40} {'ms':>9} {'of floor':>8} {'peak ×':>7}")

    def add(self, row: Row) -> None:
        self.rows.append(row)
        share = "" if row.of_floor is None else f"{100 * row.of_floor:.1f}%"
        peak = "" if row.peak is None else f"{row.peak:.2f}"
        say(f"{row.load:32} {row.contender:40} {row.ms:9.3f} {share:>8} {peak:>7} {row.note}".rstrip())


@dataclass(frozen=True, kw_only=True)
class Load:
    """One piece of work that several contenders do."""

    table: Table
    name: str
    floor_ms: float
    logits_bytes: int
    fresh: Work
    """Makes the inputs new, which is not timed: a call may have overwritten them."""
    kept_bytes: int = 0
    """Of results that any contender must leave: not counted as its memory."""
    repeats: int = 20

    def measure(self, contender: str, run: Work, *, repeats: int | None = None, note: str = "") -> None:
        self.fresh()
        peak = (peak_bytes(run) - self.kept_bytes) / self.logits_bytes
        ms = time_ms(run, before=self.fresh, repeats=repeats or self.repeats)
        self.table.add(
            Row(load=self.name, contender=contender, ms=ms, of_floor=self.floor_ms / ms, peak=peak, note=note)
        )

    def try_to_measure(self, contender: str, run: Work, *, repeats: int, note: str = "") -> None:
        """A rival may not fit or not run here; that is said and is no fault of ours."""
        try:
            self.measure(contender, run, repeats=repeats, note=note)
        except (RuntimeError, ImportError, TypeError, AttributeError, ValueError) as error:  # too big is a RuntimeError
            reason = (str(error).splitlines() or [""])[0][:100]
            say(f"{self.name:32} {contender:40} not measured: {type(error).__name__}: {reason}")
            torch.cuda.empty_cache()


class Ceilings:
    """What this card does when nothing else is asked of it, measured now."""

    def __init__(self) -> None:
        source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").normal_()
        target = torch.empty_like(source)
        copy_ms = min(time_ms(lambda: target.copy_(source)) for _ in range(2))
        left, right = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
        out = torch.empty_like(left)
        product_ms = min(time_ms(lambda: torch.mm(left, right, out=out)) for _ in range(2))
        self.bytes_per_ms = 2 * source.nbytes / copy_ms
        self.flops_per_ms = 2 * 8192**3 / product_ms

    def copy_ms(self, num_bytes: float) -> float:
        """To move so many bytes, those read and those written."""
        return num_bytes / self.bytes_per_ms

    def __str__(self) -> str:
        return f"copy {self.bytes_per_ms / 1e9:.3f} TB/s, bfloat16 product {self.flops_per_ms / 1e9:.0f} TFLOP/s"


def time_ms(run: Work, *, before: Work = lambda: None, repeats: int = 20) -> float:
    """Median of the device's time. ``before`` is not timed."""
    for _ in range(3):
        before()
        run()
    events = [(_event(), _event()) for _ in range(repeats)]
    for start, end in events:
        before()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(float(start.elapsed_time(end)) for start, end in events)


def peak_bytes(run: Work) -> int:
    """Of one call, beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    there = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - there


def write_profile(run: Work, before: Work, path: Path) -> None:
    """Every kernel of one call with its time on the device, in the order of their sums; the first dozen are said."""
    from torch.profiler import ProfilerActivity, profile

    before()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        run()
        torch.cuda.synchronize()
    events = found.key_averages()
    path.write_text(events.table(sort_by="self_device_time_total", row_limit=100, max_name_column_width=90))
    kernels = [event for event in events if event.device_type.name == "CUDA" and event.self_device_time_total > 0]
    total_us, count = sum(event.self_device_time_total for event in kernels), sum(event.count for event in kernels)
    say(f"profile of one call: {count} kernels, {total_us / 1000:.3f} ms on the device")
    for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:12]:
        say(f"  {event.self_device_time_total / 1000:8.3f} ms  {event.count:4}×  {event.key[:90]}")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _event() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return event
