"""What the passes of one step have added up on this rank, and over all ranks at its end."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist

from engine.metric_catalogue import OBJECTIVE_METRICS

OBJECTIVE_NAMES = tuple(metric.name for metric in OBJECTIVE_METRICS)

Phase = Literal["passes_s", "reduce_s", "update_s"]
"""Forward and backward; summing gradients over ranks; the optimizer."""


@dataclass
class StepSums:
    """One rank's. What several ranks know alike is added on one of them (but ``num_calls`` and ``num_rows``)."""

    num_calls: int = 0
    is_complete: bool = False
    """The step's last call has been made."""
    num_rows: int = 0
    """Response tokens whose rows went through this rank: what Megatron divides the gradient by, from the last stage."""
    num_rollouts: int = 0
    num_tokens: int = 0
    """Response tokens."""
    num_computed: int = 0
    """Positions through the model, padding included."""
    num_real: int = 0
    """Of these: no padding."""
    flops: float = 0.0
    loss_sum: float = 0.0
    metric_sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(OBJECTIVE_NAMES, 0.0))
    seconds: dict[Phase, float] = field(default_factory=lambda: {"passes_s": 0.0, "reduce_s": 0.0, "update_s": 0.0})

    @contextmanager
    def timed(self, phase: Phase) -> Iterator[None]:
        """Wall time, kernels that were launched in it included."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[phase] += time.perf_counter() - start

    def over_all_ranks(self, device: torch.device) -> StepSums:
        """Counts and sums of all ranks; seconds of this one. Collective."""
        mine = [self.num_rollouts, self.num_tokens, self.num_computed, self.num_real, self.flops, self.loss_sum]
        sums = torch.tensor([*mine, *self.metric_sums.values()], dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        rollouts, tokens, computed, real, flops, loss_sum, *metrics = sums.tolist()
        return StepSums(
            num_calls=self.num_calls,
            num_rollouts=int(rollouts),
            num_tokens=int(tokens),
            num_computed=int(computed),
            num_real=int(real),
            flops=flops,
            loss_sum=loss_sum,
            metric_sums=dict(zip(OBJECTIVE_NAMES, metrics, strict=True)),
            seconds=self.seconds,
        )


def largest_over_all_ranks(value: float, device: torch.device) -> float:
    """Collective."""
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def peak_memory_bytes() -> int:
    """The most that this rank has held, of its device's memory or, on CPU, of the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
