"""How many threads rows are split over: as many as torch has, but none for less work than its start is worth."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_WORTH_MS = 0.5


def on_threads(work: Callable[[int, int], None], num_rows: int, cost_ms: float) -> None:
    """``work(start, end)`` for all rows, on ``torch.get_num_threads()`` threads at most, which live for this call.

    Args:
        cost_ms: what all rows cost one thread, about.
    """
    num_parts = min(torch.get_num_threads(), num_rows, 1 + int(cost_ms / _WORTH_MS))
    if num_parts < 2:
        work(0, num_rows)
        return
    ends = [num_rows * i // num_parts for i in range(num_parts + 1)]
    with ThreadPoolExecutor(num_parts - 1) as pool:
        others = [pool.submit(work, start, end) for start, end in itertools.pairwise(ends[1:])]
        work(0, ends[1])
        for other in others:
            other.result()
