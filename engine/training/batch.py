"""From scored rollouts to what one forward pass of the student takes, and to the rows that the teacher has scored.

    N tokens computed      B rollouts      T response tokens of all of them      K teacher's top-k

The last token of an answer is trained but predicts nothing, so it does not go through the model: the token before each
response token is what predicts it. In the packed layout one such row may serve several rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from engine.training.packing import PackedBatch, pack, pad, split_by_budget, split_padded
from engine.transport.handoff import Uploader, consume
from engine.types import ScoredRollout
from ops import TeacherScores
from teacher.protocol import Scores

Layout = Literal["packed", "padded", "single"]
"""One trie; rows of similar length; one rollout at a time."""

Scored = Sequence[ScoredRollout[Scores]]


@dataclass(frozen=True, eq=False)
class StudentBatch:
    """One forward pass; all tensors on the student's device."""

    token_ids: Tensor
    """[rows, L] int64"""
    position_ids: Tensor
    """[rows, L] int64"""
    mask: Tensor | None
    """None: causal. Packed: [1, 1, N, N] bool, True where attention goes. Padded: [rows, L] bool, False at padding."""
    rows: Tensor
    """[T] int64: for each response token, in the order of the rollouts, the flattened position that predicts it."""
    lengths: tuple[int, ...]
    """[B] response tokens of each rollout."""
    scores: TeacherScores
    """[T] rows."""

    @property
    def num_computed_tokens(self) -> int:
        return self.token_ids.numel()


def check(scored: Scored) -> None:
    """Refuse what cannot be trained on.

    Raises:
        ValueError: no rollout, an empty prompt or response, or scores of another length.
    """
    if not scored:
        raise ValueError("a micro-batch needs at least one rollout, got none")
    for item in scored:
        rollout, scores = item.rollout, item.scores
        if not rollout.prompt.token_ids or not rollout.response_ids:
            raise ValueError(f"rollout {rollout.rollout_id} has an empty prompt or response; both need a token")
        rows = (len(scores.top_ids), len(scores.top_logprobs), len(scores.sampled_logprobs))
        if set(rows) != {rollout.num_tokens}:
            raise ValueError(
                f"rollout {rollout.rollout_id} has {rollout.num_tokens} response tokens and its scores have "
                f"{' / '.join(map(str, rows))} rows (top_ids / top_logprobs / sampled_logprobs); they must agree"
            )


def num_tokens(scored: Scored) -> int:
    """Prompt and response tokens: what counts against the budget of a micro-batch."""
    return sum(len(item.rollout.prompt.token_ids) + item.rollout.num_tokens for item in scored)


def split(scored: Scored, *, layout: Layout, budget: int) -> list[list[int]]:
    """Indices of the rollouts of each forward pass, so that none computes more than ``budget`` tokens.

    Raises:
        ValueError: one rollout alone is over the budget.
    """
    sequences = [_inputs(item) for item in scored]
    if layout == "packed":
        return split_by_budget(sequences, budget)
    lengths = [len(sequence) for sequence in sequences]
    groups = split_padded(lengths, budget)
    return groups if layout == "padded" else [[i] for group in groups for i in group]


def make_batch(scored: Scored, *, layout: Layout, pad_id: int, uploader: Uploader) -> StudentBatch:
    """Lay the rollouts out for one forward pass, on the device of ``uploader``."""
    sequences = [_inputs(item) for item in scored]
    lengths = tuple(item.rollout.num_tokens for item in scored)
    batch = pack(sequences) if layout == "packed" else pad(sequences, pad_id=pad_id)
    rows = np.concatenate([index[-length:] for index, length in zip(batch.index, lengths, strict=True)])
    mask: npt.NDArray[np.bool_] | None
    if isinstance(batch, PackedBatch):
        token_ids, position_ids = batch.token_ids[None], batch.position_ids[None]
        is_chain = bool((batch.end == batch.num_tokens).all())
        mask = None if is_chain else batch.mask()[None, None]
    else:
        token_ids, position_ids = batch.token_ids, batch.position_ids
        mask = None if batch.mask.all() else batch.mask
    arrays = [token_ids, position_ids, rows, *_score_arrays(scored), *(() if mask is None else (mask,))]
    tokens_, positions_, rows_, top_ids, top_logprobs, sampled_ids, sampled_logprobs, *masks = consume(
        uploader.upload(arrays)
    )
    return StudentBatch(
        token_ids=tokens_,
        position_ids=positions_,
        mask=masks[0] if masks else None,
        rows=rows_,
        lengths=lengths,
        scores=TeacherScores(
            top_ids=top_ids, top_logprobs=top_logprobs, sampled_ids=sampled_ids, sampled_logprobs=sampled_logprobs
        ),
    )


def _inputs(item: ScoredRollout[Scores]) -> tuple[int, ...]:
    return item.rollout.prompt.token_ids + item.rollout.response_ids[:-1]


def _score_arrays(scored: Scored) -> tuple[npt.NDArray[np.generic], ...]:
    """top_ids, top_logprobs [T, K]; sampled_ids, sampled_logprobs [T]."""
    top_k = max(item.scores.top_ids.shape[1] for item in scored)
    return (
        np.concatenate([_widen(item.scores.top_ids, top_k, -1) for item in scored]),
        np.concatenate([_widen(item.scores.top_logprobs, top_k, 0) for item in scored]),
        np.concatenate([np.asarray(item.rollout.response_ids, np.int64) for item in scored]),
        np.concatenate([item.scores.sampled_logprobs for item in scored]),
    )


def _widen(array: npt.NDArray[np.generic], top_k: int, fill: int) -> npt.NDArray[np.generic]:
    missing = top_k - array.shape[1]
    return array if missing == 0 else np.pad(array, ((0, 0), (0, missing)), constant_values=fill)
