"""What a teacher says of an answer, and what it says of itself. (Wire format below; docs/protocol.md is its text.)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt


class Scores(msgspec.Struct, frozen=True, kw_only=True):
    """Teacher's view of one response of T tokens. Row t is the distribution that token t was, or could have been, drawn
    from: after the prompt and response tokens before t. Log-probabilities are nats under the full softmax at temperature 1."""

    top_ids: npt.NDArray[np.int32]
    """[T, K], descending by log-probability; ties by id ascending."""
    top_logprobs: npt.NDArray[np.float32]
    """[T, K]"""
    sampled_logprobs: npt.NDArray[np.float32]
    """[T]: of the response's own tokens."""
    extra_logprobs: npt.NDArray[np.float32] | None = None
    """[T, E]: of the ids that the caller named."""


class TeacherInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What ``/v1/info`` answers."""

    model: str
    vocab_size: int
    """Rows of the teacher's output layer."""
    tokenizer_size: int
    """Tokens that the tokenizer knows."""
    tokenizer_fingerprint: str
    """Hex BLAKE2b over the tokenizer's sorted (token, id) pairs (``teacher.fingerprint``)."""
    max_length: int
    """Prompt and response tokens together."""
    max_top_k: int
    protocol: int


class Teacher(Protocol):
    """One teacher, near or far. ``TeacherClient``, ``LocalTeacher`` and ``ReplicaPool`` are teachers."""

    async def info(self) -> TeacherInfo: ...

    async def score(
        self,
        *,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int],
        top_k: int,
        extra_ids: npt.NDArray[np.int32] | None = None,
        alone: bool = False,
        request_id: str | None = None,
    ) -> Scores:
        """Score one response.

        Args:
            prompt_ids: at least one token.
            response_ids: T ≥ 1 tokens.
            extra_ids: [T, E] int32, ids to look up per position.
            alone: computed in a forward pass of its own, so that the answer does not depend on what else the teacher does.
            request_id: equal ids mean the same request: an answer that is under way or just made is given again.

        Raises:
            TeacherRefused: 4xx, never worth another attempt.
            TeacherUnavailable: this attempt failed.
        """
        ...

    async def close(self) -> None: ...
