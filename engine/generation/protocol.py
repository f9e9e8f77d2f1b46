"""What the Sampler asks of whatever makes tokens. Knows nothing of training, teachers or prompts files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

from engine.recipe import WeightsConfig
from engine.types import FinishReason, SamplingParams, VersionSpan

if TYPE_CHECKING:
    # 1.7 s of CPU: whoever shows or simulates a recipe does without.
    import torch


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    request_id: int
    """Unique among the requests that are open at a time."""
    token_ids: tuple[int, ...]
    """Prompt, at least one token."""
    params: SamplingParams
    stream_key: int
    """Token t of the answer is drawn with number t of this stream and nothing else."""


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """One finished answer; fields as in ``engine.types.Rollout``."""

    request_id: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    sampling_logprobs: tuple[float, ...]
    spans: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    top_ids: bytes = b""


class GeneratorStatistics(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    running: int
    """Sequences in decode slots."""
    waiting: int
    num_slots: int
    tokens_total: int
    decode_steps_total: int
    prefill_tokens_total: int
    busy_s: float
    """Seconds spent computing since ``start``, exchanges of weights included."""
    paused_s: float = 0.0
    """Of these: decoding stood still for an exchange of weights."""


class Aborted(Exception):
    """``generate`` was given up by ``abort``; nothing of the answer is kept."""


class Bucket(msgspec.Struct, frozen=True, kw_only=True):
    """Some of a version's tensors. Valid until the iterator that gave it is advanced: the buffers are reused."""

    names: tuple[str, ...]
    """Hugging Face parameter names."""
    tensors: tuple[torch.Tensor, ...]
    """On one device."""
    written: torch.cuda.Event | None = None
    """Reached when they hold the version (``engine.transport.handoff.record``): who reads them on another CUDA stream
    has it wait for this first. None: they hold it already, as always on CPU."""


class Generator(Protocol):
    """Continuous batching behind three calls. All methods are called from the event loop and never block it."""

    async def start(self) -> None:
        """Load the model and make the first decode step possible.

        Raises:
            ModelError: the folder is missing, broken, or not a causal language model.
        """
        ...

    async def generate(
        self, request: GenerationRequest, *, on_begin: Callable[[int], None] | None = None
    ) -> Generation:
        """Answer one prompt. Requests with one prompt that are open together are prefilled once.

        ``on_begin(version)`` is called on the event loop when the request enters a decode slot, with the policy version
        that its first token will be sampled under. Cancelling the call frees the slot.

        Raises:
            Aborted: ``abort`` was called for this request.
            AnswerLost: one of several engines is gone, and this answer with it; ask again.
            GeneratorDied: the engine is gone.
            ValueError: prompt and answer do not fit the model's positions, or a token id is out of range.
        """
        ...

    async def generate_wave(
        self, requests: Sequence[GenerationRequest], *, on_begin: Callable[[int, int], None] | None = None
    ) -> list[Generation]:
        """Answer several prompts, admitted together and in this order, so that what shares a decode step is a function
        of the arguments alone: alone in the engine, the same wave under the same weights gives the same bits.

        ``on_begin(request_id, version)`` as in ``generate``.
        """
        ...

    def abort(self, request_id: int) -> None:
        """Give up one open request; unknown ids are ignored."""
        ...

    async def update_weights(
        self, version: int, buckets: Iterable[Bucket], *, config: WeightsConfig, digest: str | None = None
    ) -> None:
        """Become ``version``: returns when the next token of every sequence will come from the new weights.

        ``buckets`` is consumed in a worker thread; every tensor is copied. With ``config.mode="drain"`` the switch
        waits until all running sequences have ended, and no new one begins before it.

        Args:
            digest: of all tensors in the order of the buckets (``engine.transport.manifest``); None: not compared.

        Raises:
            WeightsMismatch: what came has another digest; the present weights stay.
            ValueError: a name or shape that the model does not have.
        """
        ...

    def capacity(self) -> int:
        """Answers that it can decode side by side as things stand: fewer than slots while memory is full, or one of
        several engines away. Cheap; whoever keeps it full asks before each answer."""
        ...

    def statistics(self) -> GeneratorStatistics: ...

    async def watch(self) -> None:
        """Never return. Whoever can start the engine again watches it, since an engine without requests dies unseen.

        Raises:
            GeneratorDied: the engine is gone.
        """
        ...

    async def stop(self) -> None:
        """Give up what is open (``Aborted``) and free the model. Idempotent."""
        ...
