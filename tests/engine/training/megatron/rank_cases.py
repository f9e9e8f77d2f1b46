"""What tests and ranks tell each other: rollouts, settings, how rollouts are dealt, what a rank saw. Knows no Megatron,
so that the tests' own process stays without it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from engine.megatron_config import MegatronConfig
from engine.objective_config import ObjectiveConfig
from engine.recipe import LearnerConfig, StudentConfig
from engine.training.rank_work import RankMicroBatch, RankReport, RankRollout, RankSettings, RankWork
from engine.types import Prompt, Rollout, ScoredRollout, StepReport, VersionSpan
from teacher.protocol import Scores

LEARNER = LearnerConfig(
    backend="megatron",
    lr=1e-2,
    eps=1e-2,
    weight_decay=0.1,
    grad_clip=0.5,
    warmup_steps=2,
    micro_batch_tokens=128,
    megatron=MegatronConfig(dtype="float32"),
)
"""A large eps keeps Adam's first steps smooth: with 1e-8 they are ±lr, whatever rounding says the sign is."""

NUM_STEPS = 10

ON_RANKS = "tests.engine.training.megatron.trainer_on_ranks"
"""Imports Megatron, so only ranks load it."""


Pieces = list[tuple[str, tuple[slice, ...], Tensor]]
"""Of Hugging Face tensors: name, where in it, values. NaN where this rank does not know."""


class Steps(NamedTuple):
    """What one rank saw."""

    reports: list[RankReport]
    """Of all calls of ``accumulate``."""
    steps: list[StepReport]
    gradients: list[Pieces]
    """Of each step, divided by the tokens, not yet clipped."""


class Overlapped(NamedTuple):
    """What one rank saw of steps whose sums and gathers go on beside the passes."""

    steps: list[StepReport]
    versions: list[str]
    """Digest of each version, exported as soon as its step is done; of rank 0."""
    sums_begun: list[tuple[int, int]]
    """Before each ``finish_step``: buckets whose sum had begun, and all."""
    gathers_begun: list[tuple[int, int]]
    """After it: buckets whose gather had begun and was not waited for, and all."""
    late: str
    """What is said of a call after the step's last one."""


def settings(
    folder: Path, layout: dict[str, Any] | None = None, *, objective: ObjectiveConfig | None = None, **changes: Any
) -> RankSettings:
    """``changes`` are fields of ``LEARNER``."""
    megatron = msgspec.structs.replace(LEARNER.megatron, **(layout or {}))
    return RankSettings(
        learner=msgspec.structs.replace(LEARNER, megatron=megatron, **changes),
        student=StudentConfig(path=str(folder)),
        objective=objective or ObjectiveConfig(),
        num_steps=NUM_STEPS,
        seed=0,
    )


def num_ranks(layout: dict[str, Any]) -> int:
    return MegatronConfig(**layout).num_ranks


def make_rollouts(num_rollouts: int, *, vocab_size: int, seed: int = 0, top_k: int = 5) -> list[RankRollout]:
    """Of different lengths; prompts, answers and teacher are random: a function of ``seed`` and the place."""
    rollouts = []
    for index in range(num_rollouts):
        random = np.random.default_rng([seed, index])
        prompt = random.integers(3, vocab_size, random.integers(1, 9), dtype=np.int32)
        response = random.integers(3, vocab_size, random.integers(1, 13), dtype=np.int32)
        logits = 2.0 * random.standard_normal((len(response), vocab_size))
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        top_ids = np.argsort(-logprobs, axis=1)[:, :top_k].astype(np.int32)
        scores = Scores(
            top_ids=top_ids,
            top_logprobs=np.take_along_axis(logprobs, top_ids, axis=1).astype(np.float32),
            sampled_logprobs=logprobs[np.arange(len(response)), response].astype(np.float32),
        )
        rollouts.append(
            RankRollout(
                index=index,
                prompt_ids=prompt,
                response_ids=response,
                scores=scores,
                sampling_logprobs=(-2.0 - random.random(len(response))).astype(np.float32),
            )
        )
    return rollouts


def deal(
    rollouts: Sequence[RankRollout],
    *,
    share: int,
    num_shares: int,
    is_last_stage: bool,
    per_pass: int = 2,
    is_last: bool = False,
) -> RankWork:
    """What the data-parallel share ``share`` gets: every ``num_shares``-th rollout, in passes of ``per_pass``; as many
    passes as the largest share needs."""
    mine = [rollout if is_last_stage else msgspec.structs.replace(rollout, scores=None) for rollout in rollouts]
    mine = mine[share::num_shares]
    largest = -(-len(rollouts) // num_shares)
    return RankWork(
        micro_batches=tuple(
            RankMicroBatch(rollouts=tuple(mine[start : start + per_pass])) for start in range(0, largest, per_pass)
        ),
        is_last=is_last,
    )


def as_scored(rollout: RankRollout) -> ScoredRollout[Scores]:
    """What the torch trainer takes."""
    assert rollout.scores is not None
    assert rollout.sampling_logprobs is not None
    num_tokens = len(rollout.response_ids)
    return ScoredRollout(
        rollout=Rollout(
            prompt=Prompt(
                rollout_id=rollout.index,
                epoch=0,
                prompt_index=0,
                sample_index=0,
                token_ids=tuple(rollout.prompt_ids.tolist()),
            ),
            response_ids=tuple(rollout.response_ids.tolist()),
            logprobs=tuple(rollout.sampling_logprobs.tolist()),
            sampling_logprobs=tuple(rollout.sampling_logprobs.tolist()),
            spans=(VersionSpan(version=0, start=0, end=num_tokens),),
            finish_reason="length",
        ),
        scores=rollout.scores,
    )


def whole_gradients(seen: Sequence[Steps], step: int) -> dict[str, Tensor]:
    """Put together from all ranks' pieces; NaN where nobody knows."""
    pieces = [piece for one in seen for piece in one.gradients[step]]
    whole: dict[str, Tensor] = {}
    for name in sorted({name for name, _, _ in pieces}):
        mine = [(there, values) for other, there, values in pieces if other == name]
        size = [max(there[i].stop for there, _ in mine) for i in range(len(mine[0][0]))]
        whole[name] = torch.full(size, float("nan"))
        for there, values in mine:
            place = whole[name][there]
            known = ~values.view(place.shape).isnan()
            place[known] = values.view(place.shape)[known]
    return whole
