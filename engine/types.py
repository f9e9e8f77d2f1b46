"""The values that flow between actors. Frozen, made of plain Python, no torch.

A *prompt occurrence* is one sample to be made from one row of the prompt file in one epoch. Its identity is
``(epoch, prompt_index, sample_index)``; its ticket ``rollout_id`` is its place in the order of admission. A policy
version v is the student's weights after optimizer step v; version 0 is the student as loaded.
"""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

import msgspec

ScoresT = TypeVar("ScoresT")

FinishReason = Literal["stop", "length", "reference"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is drawn."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    stop_ids: tuple[int, ...] = ()
    """A sampled stop id ends the rollout and is part of it."""
    num_top_ids: int = 0
    """So many ids with the largest logits are kept for each token that is drawn (``Rollout.top_ids``)."""


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt occurrence: what one rollout begins with."""

    rollout_id: int
    """Ticket: position in the order of admission, unique in a run."""
    epoch: int
    prompt_index: int
    """Row in the prompt file, counted from 0 before shuffling."""
    sample_index: int
    """0 … samples_per_prompt − 1."""
    token_ids: tuple[int, ...]
    reference_ids: tuple[int, ...] | None = None
    """Set when this occurrence trains on the file's own completion instead of a sample (λ of GKD)."""
    stream_key: int = 0
    """64-bit key of the random stream that this occurrence alone draws from (``engine.streams``)."""


class VersionSpan(msgspec.Struct, frozen=True, kw_only=True):
    """Response tokens [start, end) were sampled by policy version ``version``."""

    version: int
    start: int
    end: int
    stale_kv: bool = False
    """The keys and values of earlier tokens were computed by an older version and kept."""


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """One finished answer of the student."""

    prompt: Prompt
    response_ids: tuple[int, ...]
    """T ≥ 1 tokens; the last one is the stop id when ``finish_reason`` is "stop"."""
    logprobs: tuple[float, ...]
    """[T] nats: the sampled token under the model that sampled it, at temperature 1, whole vocabulary.
    Empty for a reference completion."""
    sampling_logprobs: tuple[float, ...]
    """[T] nats under the distribution it was drawn from (after temperature, top-k, top-p). Empty for a reference."""
    spans: tuple[VersionSpan, ...]
    """Contiguous, cover [0, T), versions ascending."""
    finish_reason: FinishReason
    top_ids: bytes = b""
    """[T, ``SamplingParams.num_top_ids``] little-endian int32: at each position the ids with the largest logits under
    the model that sampled there, in descending order. Empty when none were asked for, and for a reference."""

    @property
    def rollout_id(self) -> int:
        return self.prompt.rollout_id

    @property
    def version_first(self) -> int:
        return self.spans[0].version

    @property
    def version_last(self) -> int:
        return self.spans[-1].version

    @property
    def num_tokens(self) -> int:
        """Response tokens: the ones that are trained."""
        return len(self.response_ids)


class ScoredRollout(msgspec.Struct, Generic[ScoresT], frozen=True, kw_only=True):
    """A rollout and what the teacher said of it; this layer only carries ``scores`` (``teacher.protocol.Scores``)."""

    rollout: Rollout
    scores: ScoresT


class StepReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one optimizer step did."""

    step: int
    """Counted from 1; afterwards the policy version is ``step``."""
    num_rollouts: int
    num_tokens: int
    """Response tokens trained: the divisor of ``loss`` and of the gradient."""
    num_micro_batches: int
    loss: float
    """Mean of the objective over the step's response tokens, nats per token."""
    grad_norm: float
    """Before clipping, of the gradient of ``loss``."""
    lr: float
    skipped: bool = False
    """The gradient was not finite and the recipe says ``skip``: the weights did not change."""
    metrics: dict[str, float] = {}
    """Token means of what the objective measures on the side (teacher mass on the top-k, entropies, …)."""
