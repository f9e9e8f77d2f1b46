"""A trainer that learns nothing and takes the time that learning would take: the simulation's side of
``engine.training.protocol``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from engine.costs import micro_batch_s
from engine.generation.protocol import Bucket
from engine.recipe import ReplayConfig
from engine.training.protocol import EvalResult, MicroBatchReport
from engine.types import ScoredRollout, StepReport
from teacher.protocol import Scores


class ReplayTrainer:
    """Satisfies ``engine.training.protocol.Trainer``.

    Args:
        costs: seconds.
        spend: takes the seconds of the call under way (``engine.virtual_time.VirtualWorker.spend``).
    """

    def __init__(self, *, costs: ReplayConfig, spend: Callable[[float], None]) -> None:
        self.version = 0
        self.busy_s = 0.0
        """Of micro-batches and optimizer steps."""
        self.tokens_total = 0
        """Response tokens trained."""
        self._costs = costs
        self._spend = spend
        self._num_rollouts = 0
        self._num_tokens = 0
        self._num_micro_batches = 0

    def start(self) -> None: ...

    def accumulate(self, micro_batch: Sequence[ScoredRollout[Scores]]) -> MicroBatchReport:
        lengths = [len(s.rollout.prompt.token_ids) + s.rollout.num_tokens for s in micro_batch]
        num_tokens = sum(scored.rollout.num_tokens for scored in micro_batch)
        self._take(micro_batch_s(self._costs, lengths))
        self._num_rollouts += len(micro_batch)
        self._num_tokens += num_tokens
        self._num_micro_batches += 1
        return MicroBatchReport(
            num_rollouts=len(micro_batch),
            num_tokens=num_tokens,
            num_computed_tokens=sum(lengths),
            loss_sum=0.0,
            rollout_losses=(0.0,) * len(micro_batch),
        )

    def finish_step(self) -> StepReport:
        self._take(self._costs.optimizer_s)
        self.version += 1
        self.tokens_total += self._num_tokens
        report = StepReport(
            step=self.version,
            num_rollouts=self._num_rollouts,
            num_tokens=self._num_tokens,
            num_micro_batches=self._num_micro_batches,
            loss=0.0,
            grad_norm=0.0,
            lr=0.0,
        )
        self._num_rollouts = self._num_tokens = self._num_micro_batches = 0
        return report

    def evaluate(self, scored: Sequence[ScoredRollout[Scores]]) -> list[EvalResult]:
        return [EvalResult(num_tokens=s.rollout.num_tokens, kl_sum=0.0, nll_sum=0.0) for s in scored]

    def score(self, token_ids: Sequence[int]) -> list[float]:
        return [0.0] * (len(token_ids) - 1)

    def export(self, *, bucket_bytes: int) -> Iterator[Bucket]:
        return iter(())

    def digest(self) -> str:
        return ""

    def save(self, folder: Path) -> None:
        self._spend(self._costs.checkpoint_s)

    def load(self, folder: Path) -> None:
        raise RuntimeError("a simulation begins at step 0 and keeps no checkpoint: there is nothing to load")

    def stop(self) -> None: ...

    def _take(self, seconds: float) -> None:
        self.busy_s += seconds
        self._spend(seconds)
