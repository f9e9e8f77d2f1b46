"""What the Learner asks of whatever holds the student's master weights. Knows nothing of sampling.

All methods are synchronous and are called one at a time from the learner's own thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from engine.generation.protocol import Bucket
from engine.types import ScoredRollout, StepReport
from teacher.protocol import Scores


class TokenLosses(msgspec.Struct, frozen=True, kw_only=True):
    """One rollout of a micro-batch, token by token, for people to look at."""

    index: int
    """Place of the rollout in the micro-batch."""
    divergences: tuple[float, ...]
    """[T] the objective at each response token, nats."""
    logprobs: tuple[float, ...]
    """[T] nats: each response token under the student that is trained."""


class MicroBatchReport(msgspec.Struct, frozen=True, kw_only=True):
    num_rollouts: int
    num_tokens: int
    """Response tokens."""
    num_computed_tokens: int
    """Token positions that went through the model: shared prefixes count once, padding counts."""
    loss_sum: float
    """Sum of the objective over response tokens, nats."""
    rollout_losses: tuple[float, ...]
    """Mean objective of each rollout, in the order given, nats per token."""
    token_losses: TokenLosses | None = None
    """Of one rollout, in the first micro-batch of a step; None in the others, and from trainers that do not tell."""


class EvalResult(msgspec.Struct, frozen=True, kw_only=True):
    """One held-out answer under the student, sums over its tokens."""

    num_tokens: int
    kl_sum: float
    """Forward KL(teacher ‖ student) with tail bucket over the response positions, nats."""
    nll_sum: float
    """−log-probability of the answer's own tokens under the student, nats."""


class Trainer(Protocol):
    """Streaming accumulation: any number of ``accumulate``, then one ``finish_step``."""

    version: int
    """Optimizer steps done; equals the policy version of ``export``."""

    def start(self) -> None:
        """Load student and optimizer.

        Raises:
            ModelError: the folder is missing, broken, or not a causal language model.
        """
        ...

    def accumulate(self, micro_batch: Sequence[ScoredRollout[Scores]]) -> MicroBatchReport:
        """Forward and backward of the *sum* of the objective over the response tokens; adds to the gradient.

        Raises:
            NonFiniteError: the loss is NaN or infinite (only with ``on_nonfinite="stop"``).
            ValueError: scores and response differ in length, or the micro-batch is over the token budget.
        """
        ...

    def finish_step(self) -> StepReport:
        """Divide the gradient by the step's response tokens, clip, update, clear; ``version`` goes up by one.

        Raises:
            NonFiniteError: the gradient norm is not finite (only with ``on_nonfinite="stop"``); no weight has changed.
        """
        ...

    def evaluate(self, scored: Sequence[ScoredRollout[Scores]]) -> list[EvalResult]:
        """Forward only, no gradient, dropout off."""
        ...

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probability of each token but the first, nats; forward only, dropout off."""
        ...

    def export(self, *, bucket_bytes: int) -> Iterator[Bucket]:
        """All parameters (tied ones once) and persistent buffers under Hugging Face names, in a fixed order."""
        ...

    def digest(self) -> str:
        """Hex digest of all exported tensors: equal bits give equal digests."""
        ...

    def save(self, folder: Path) -> None:
        """Write ``student/`` (Hugging Face format, tokenizer) and ``trainer/`` (optimizer, step) under ``folder``."""
        ...

    def load(self, folder: Path) -> None:
        """Continue from what ``save`` wrote, bit for bit. Called instead of ``start``."""
        ...

    def stop(self) -> None: ...
