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
import torch
from torch import Tensor

from engine.generation.top_ids import top_ids_of
from engine.training.packing import PackedBatch, PaddedBatch, pack, pad, split_by_budget, split_padded
from engine.training.tree_attention import Tree, tree_of
from engine.transport.handoff import HostArray, Uploader, consume
from engine.types import ScoredRollout
from ops import TeacherScores
from teacher.protocol import Scores

PAD_ID = 0
"""What fills padded rows: in every vocabulary, and never attended to."""

Layout = Literal["tree", "packed", "padded", "single"]
"""One trie with attention by branch; one trie with a mask; rows of similar length; one rollout at a time."""

Scored = Sequence[ScoredRollout[Scores]]


@dataclass(frozen=True, eq=False)
class ModelInputs:
    """What the student sees of a batch; all tensors on its device."""

    token_ids: Tensor
    """[rows, L] int64"""
    position_ids: Tensor
    """[rows, L] int64"""
    mask: Tensor | None = None
    """None: causal, or ``tree``. Packed: [1, 1, N, N] bool, True where attention goes. Padded: [rows, L] bool, False at
    padding."""
    tree: Tree | None = None
    """Only of layout "tree"."""

    @property
    def num_tokens(self) -> int:
        """Positions that are computed, padding included."""
        return self.token_ids.numel()


@dataclass(frozen=True, eq=False)
class StudentBatch:
    """One forward pass and what it is compared with; all tensors on the student's device."""

    inputs: ModelInputs
    rows: Tensor
    """[T] int64: for each response token, in the order of the rollouts, the flattened position that predicts it."""
    lengths: tuple[int, ...]
    """[B] response tokens of each rollout."""
    scores: TeacherScores
    """[T] rows."""
    sampling_logprobs: Tensor | None = None
    """[T] float32 nats: each response token under the distribution that it was drawn from; None: one was not drawn."""


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
    widths = {(_width(top_ids_of(item.rollout)), _width(item.scores.extra_logprobs)) for item in scored}
    if len(widths) > 1 or any(asked != told for asked, told in widths):
        raise ValueError(
            f"the rollouts keep {sorted(asked for asked, _ in widths)} of the student's most likely ids at each "
            f"position, and the teacher told of {sorted(told for _, told in widths)}; they must all agree"
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
    if layout in ("tree", "packed"):
        return split_by_budget(sequences, budget)
    lengths = [len(sequence) for sequence in sequences]
    groups = split_padded(lengths, budget)
    return groups if layout == "padded" else [[i] for group in groups for i in group]


def lay_out(sequences: Sequence[Sequence[int]], layout: Layout) -> PackedBatch | PaddedBatch:
    """The sequences as the model will see them; ``index`` says where each of them went."""
    return pack(sequences) if layout in ("tree", "packed") else pad(sequences, pad_id=PAD_ID)


def upload(
    batch: PackedBatch | PaddedBatch, *others: HostArray, layout: Layout, uploader: Uploader
) -> tuple[ModelInputs, tuple[Tensor, ...]]:
    """Bring a batch, and other arrays with it, to the device in one go."""
    mask: npt.NDArray[np.bool_] | None = None
    tree = None
    token_ids, position_ids = batch.token_ids, batch.position_ids
    if isinstance(batch, PaddedBatch):
        mask = None if batch.mask.all() else batch.mask
    else:
        token_ids, position_ids = token_ids[None], position_ids[None]
        is_branched = bool((batch.end != batch.num_tokens).any())
        if is_branched and layout == "tree":
            tree = tree_of(batch, device=uploader.device)
        elif is_branched:
            mask = batch.mask()[None, None]
    arrays = [token_ids, position_ids, *others, *(() if mask is None else (mask,))]
    tokens, positions, *rest = consume(uploader.upload(arrays))
    inputs = ModelInputs(token_ids=tokens, position_ids=positions, mask=None if mask is None else rest[-1], tree=tree)
    return inputs, tuple(rest[: len(others)])


def make_batch(scored: Scored, *, layout: Layout, uploader: Uploader) -> StudentBatch:
    """Lay the rollouts out for one forward pass, on the device of ``uploader``."""
    lengths = tuple(item.rollout.num_tokens for item in scored)
    batch = lay_out([_inputs(item) for item in scored], layout)
    rows = np.concatenate([index[-length:] for index, length in zip(batch.index, lengths, strict=True)])
    arrays = {"rows": rows, **_score_arrays(scored), **_student_arrays(scored)}
    inputs, tensors = upload(batch, *arrays.values(), layout=layout, uploader=uploader)
    named = dict(zip(arrays, tensors, strict=True))
    return StudentBatch(
        inputs=inputs,
        rows=named.pop("rows"),
        lengths=lengths,
        sampling_logprobs=named.pop("sampling_logprobs", None),
        scores=TeacherScores(**named),
    )


def _inputs(item: ScoredRollout[Scores]) -> tuple[int, ...]:
    return item.rollout.prompt.token_ids + item.rollout.response_ids[:-1]


def _score_arrays(scored: Scored) -> dict[str, HostArray]:
    """What ``TeacherScores`` is made of, under its names."""
    top_k = max(item.scores.top_ids.shape[1] for item in scored)
    return {
        "top_ids": _top_ids([item.scores.top_ids for item in scored], top_k),
        "top_logprobs": np.concatenate([_widen(item.scores.top_logprobs, top_k, 0) for item in scored]),
        "sampled_ids": np.concatenate([np.asarray(item.rollout.response_ids, np.int64) for item in scored]),
        "sampled_logprobs": np.concatenate([item.scores.sampled_logprobs for item in scored]),
    }


def _student_arrays(scored: Scored) -> dict[str, npt.NDArray[np.generic]]:
    """What the student kept when it sampled: whatever all of these rollouts have of it."""
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    told = [item.scores.extra_logprobs for item in scored]
    top_ids = [top_ids_of(item.rollout) for item in scored]
    if all(extra is not None for extra in told) and all(ids is not None for ids in top_ids):
        arrays["extra_ids"] = np.concatenate([ids for ids in top_ids if ids is not None])
        arrays["extra_logprobs"] = np.concatenate([extra for extra in told if extra is not None])
    if all(item.rollout.sampling_logprobs for item in scored):
        arrays["sampling_logprobs"] = np.concatenate(
            [np.asarray(item.rollout.sampling_logprobs, np.float32) for item in scored]
        )
    return arrays


def _top_ids(lists: Sequence[npt.NDArray[np.int32]], top_k: int) -> HostArray:
    """[T, K] of all rollouts. Of whole vocabularies, which list their ids in order, all rows are the same memory."""
    in_order = np.arange(top_k, dtype=np.int32)
    if all(ids.shape[1] == top_k and (ids[0] == in_order).all() and (ids == in_order).all() for ids in lists):
        return torch.from_numpy(in_order).expand(sum(map(len, lists)), top_k)
    return np.concatenate([_widen(ids, top_k, -1) for ids in lists])


def _width(array: npt.NDArray[np.generic] | None) -> int:
    return 0 if array is None else array.shape[1]


def _widen(array: npt.NDArray[np.generic], top_k: int, fill: int) -> npt.NDArray[np.generic]:
    missing = top_k - array.shape[1]
    return array if missing == 0 else np.pad(array, ((0, 0), (0, missing)), constant_values=fill)
