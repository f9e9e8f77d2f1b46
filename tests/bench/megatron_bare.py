"""What ``bench_megatron`` compares with: the same passes and steps in a loop inside the rank, which nobody asks for."""

from __future__ import annotations

import time
from typing import Protocol

from engine.training.rank_work import RankSettings, RankTrainer, RankWork


class BareLoop(RankTrainer, Protocol):
    def bare_steps(self, work: RankWork, num_steps: int, num_calls: int) -> list[float]:
        """Seconds of each step, without anybody asking for it."""
        ...


def make_bare(settings: RankSettings) -> BareLoop:
    """In the rank."""
    from engine.training.megatron_inside.trainer import MegatronRankTrainer
    from engine.transport.shared_arrays import SharedBuffers

    class Bare(MegatronRankTrainer):
        def bare_steps(self, work: RankWork, num_steps: int, num_calls: int) -> list[float]:
            seconds = []
            for _ in range(num_steps):
                began = time.perf_counter()
                for _ in range(num_calls):
                    self.accumulate(work)
                self.finish_step()
                seconds.append(time.perf_counter() - began)
            return seconds

    return Bare(settings=settings, buffers=SharedBuffers())
