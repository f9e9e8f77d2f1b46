"""The objective on the last pipeline stage: hidden states of the rows that predict response tokens, multiplied with
this rank's part of the head a block at a time. No [tokens, vocabulary] tensor exists.

    s tokens of the packed row      d hidden size      T response tokens of the micro-batch
    T' of them whose row this context-parallel rank holds (T, without context parallelism)

Tensor-parallel ranks have the same T' rows and the same values. What they sum over each other is ``ops``'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core import parallel_state
from torch import Tensor

from engine.training.megatron_inside.inputs import Row
from engine.training.megatron_inside.model import StudentModel
from engine.training.rank_work import RankRollout
from engine.transport.handoff import Uploader, consume
from ops import Divergence, Objective, TeacherScores, linear_divergence
from teacher.protocol import Scores

Arrays = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, eq=False)
class Targets:
    """What one micro-batch is compared with; tensors on the device."""

    columns: Tensor
    """[T'] int64: which column of this rank's row predicts each token."""
    is_here: tuple[npt.NDArray[np.bool_], ...]
    """Of each rollout: [its response tokens], which of them are among the T'."""
    scores: TeacherScores
    """[T'] rows."""
    sampling_logprobs: Tensor | None
    """[T'] float32; None: one rollout was not drawn."""


@dataclass(frozen=True, eq=False)
class Found:
    """What a pass said of its response tokens, no gradient."""

    values: Tensor
    """[T'] the objective, nats."""
    metrics: dict[str, Tensor]
    """[T'] each (``ops.Divergence.metrics``)."""
    is_here: tuple[npt.NDArray[np.bool_], ...]
    """As in ``Targets``."""


def make_targets(rollouts: Sequence[RankRollout], row: Row, uploader: Uploader) -> Targets | None:
    """None: this rank holds no row that predicts anything.

    Raises:
        ValueError: a rollout without scores, or with scores of another length.
    """
    columns = [_columns(rollout, places) for rollout, places in zip(rollouts, row.places, strict=True)]
    is_here = tuple(places >= 0 for places in columns)
    if not any(here.any() for here in is_here):
        return None
    every = np.concatenate(is_here)
    arrays: Arrays = {"columns": np.concatenate(columns)}
    arrays |= _score_arrays(rollouts) | _student_arrays(rollouts)
    tensors = consume(uploader.upload([np.ascontiguousarray(array[every]) for array in arrays.values()]))
    named = dict(zip(arrays, tensors, strict=True))
    return Targets(
        columns=named.pop("columns"),
        is_here=is_here,
        sampling_logprobs=named.pop("sampling_logprobs", None),
        scores=TeacherScores(**named),
    )


def loss_of(
    hidden: Tensor, model: StudentModel, targets: Targets | None, objective: Objective, **measure: Any
) -> tuple[Tensor, Tensor, Found | None]:
    """What Megatron's schedule wants of a loss function.

    Args:
        hidden: [1, s, d], whole on every tensor-parallel rank; its gradient is left as this rank's summand.
        measure: temperature and the like, as ``ops.linear_divergence`` takes them.

    Returns:
        Sum of the objective over the T' rows; T' as int32; what is reported.
    """
    weight = model.head_weight
    if targets is None:
        # Nothing to learn, and yet every parameter must get a gradient, or its pass would never end.
        return hidden.sum() * 0.0 + weight.sum() * 0.0, torch.zeros((), dtype=torch.int32, device=hidden.device), None
    group = parallel_state.get_tensor_model_parallel_group()
    out: Divergence = linear_divergence(
        objective,
        hidden[0].index_select(0, targets.columns),
        weight,
        targets.scores,
        tp_group=group if group.size() > 1 else None,
        vocab_size=model.shape.vocab_size,
        vocab_start=group.rank() * weight.shape[0],
        reduce_hidden_grad=False,
        behaviour_logprobs=targets.sampling_logprobs,
        **measure,
    )
    num_tokens = torch.tensor(len(targets.columns), dtype=torch.int32, device=hidden.device)
    found = Found(values=out.values.detach(), metrics=out.metrics, is_here=targets.is_here)
    return out.values.sum(), num_tokens, found


def _columns(rollout: RankRollout, places: Tensor) -> npt.NDArray[np.int64]:
    """[response tokens]; −1: another context-parallel rank's."""
    start = len(rollout.prompt_ids) - 1
    columns: npt.NDArray[np.int64] = places[start : start + len(rollout.response_ids)].numpy()
    return columns


def _score_arrays(rollouts: Sequence[RankRollout]) -> Arrays:
    """What ``TeacherScores`` is made of, under its names; [T, …]."""
    scores = [_scores(rollout) for rollout in rollouts]
    top_k = max(one.top_ids.shape[1] for one in scores)
    return {
        "top_ids": np.concatenate([_widen(one.top_ids, top_k, -1) for one in scores]),
        "top_logprobs": np.concatenate([_widen(one.top_logprobs, top_k, 0) for one in scores]),
        "sampled_ids": np.concatenate([rollout.response_ids.astype(np.int64) for rollout in rollouts]),
        "sampled_logprobs": np.concatenate([one.sampled_logprobs for one in scores]),
    }


def _student_arrays(rollouts: Sequence[RankRollout]) -> Arrays:
    """What the student kept when it sampled: whatever all of these rollouts have of it."""
    arrays: Arrays = {}
    top_ids = [rollout.top_ids for rollout in rollouts]
    extra = [_scores(rollout).extra_logprobs for rollout in rollouts]
    if all(ids is not None for ids in top_ids) and all(logprobs is not None for logprobs in extra):
        arrays["extra_ids"] = np.concatenate([ids for ids in top_ids if ids is not None])
        arrays["extra_logprobs"] = np.concatenate([logprobs for logprobs in extra if logprobs is not None])
    sampling = [rollout.sampling_logprobs for rollout in rollouts]
    if all(logprobs is not None for logprobs in sampling):
        arrays["sampling_logprobs"] = np.concatenate([logprobs for logprobs in sampling if logprobs is not None])
    return arrays


def _scores(rollout: RankRollout) -> Scores:
    scores = rollout.scores
    if scores is None or len(scores.top_ids) != len(rollout.response_ids):
        has = "no scores" if scores is None else f"scores of {len(scores.top_ids)} tokens"
        raise ValueError(
            f"rollout {rollout.index} has {has} on the last pipeline stage and {len(rollout.response_ids)} response "
            "tokens; they must agree"
        )
    return scores


def _widen(array: npt.NDArray[np.generic], top_k: int, fill: int) -> npt.NDArray[np.generic]:
    missing = top_k - array.shape[1]
    return array if missing == 0 else np.pad(array, ((0, 0), (0, missing)), constant_values=fill)
