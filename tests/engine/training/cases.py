"""Scored rollouts without a sampler or a teacher, and the training step written out plainly in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from engine.generation.top_ids import pack_ids, top_ids_of
from engine.objective_config import ObjectiveConfig
from engine.recipe import LearnerConfig, StudentConfig
from engine.training.hf import HFTrainer
from engine.training.objectives import make_objective
from engine.types import Prompt, Rollout, ScoredRollout, VersionSpan
from ops import TeacherScores, reference_divergence
from teacher.protocol import Scores
from tests.support.models import load

VOCAB = 384
"""Of ``tests.support.models.tiny_model``."""

CONFIG = LearnerConfig(lr=1e-2, eps=1e-2, weight_decay=0.1, grad_clip=0.5, micro_batch_tokens=256, block_rows=4)
"""A large eps keeps Adam's first steps smooth: with 1e-8 they are ±lr, whatever rounding says the sign is."""

Scored = ScoredRollout[Scores]


def make_trainer(
    folder: Path, *, objective: ObjectiveConfig | None = None, steps: int = 10, **changes: Any
) -> HFTrainer:
    """Not started; ``changes`` are fields of ``CONFIG``."""
    return HFTrainer(
        config=msgspec.structs.replace(CONFIG, **changes),
        student=StudentConfig(path=str(folder)),
        objective=objective or ObjectiveConfig(),
        steps=steps,
    )


def started(folder: Path, **changes: Any) -> HFTrainer:
    trainer = make_trainer(folder, **changes)
    trainer.start()
    return trainer


def make_scored(
    *,
    rollout_id: int = 0,
    prompt: Sequence[int] = (5, 6, 7),
    response: Sequence[int] = (8, 9),
    top_k: int = 5,
    num_top_ids: int = 0,
    seed: int = 0,
) -> Scored:
    """Teacher and sampling student are random: a function of ``seed``, ``rollout_id`` and the position."""
    random = np.random.default_rng([seed, rollout_id])
    logits = 3.0 * random.standard_normal((len(response), VOCAB))
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    top_ids = np.argsort(-logprobs, axis=1)[:, :top_k].astype(np.int32)
    arrays = {
        "top_ids": top_ids,
        "top_logprobs": np.take_along_axis(logprobs, top_ids, axis=1).astype(np.float32),
        "sampled_logprobs": logprobs[np.arange(len(response)), list(response)].astype(np.float32),
    }
    student = random.random((len(response), VOCAB)).argsort(axis=1)[:, :num_top_ids]
    if num_top_ids:
        arrays["extra_logprobs"] = np.take_along_axis(logprobs, student, axis=1).astype(np.float32)
    for array in arrays.values():
        array.setflags(write=False)  # as they come from the wire
    drawn = tuple((-3.0 - 5.0 * random.random(len(response))).tolist())
    return ScoredRollout(
        rollout=Rollout(
            prompt=Prompt(rollout_id=rollout_id, epoch=0, prompt_index=0, sample_index=0, token_ids=tuple(prompt)),
            response_ids=tuple(response),
            logprobs=drawn,
            sampling_logprobs=drawn,
            spans=(VersionSpan(version=0, start=0, end=len(response)),),
            finish_reason="length",
            top_ids=pack_ids(student) if num_top_ids else b"",
        ),
        scores=Scores(**arrays),
    )


def make_step(*, seed: int = 0, **scored: Any) -> list[Scored]:
    """Seven rollouts: samples of one prompt, one that begins another, twins, a stranger, and answers of one token."""
    stem = (3, 11, 12, 13)
    texts = [
        ((*stem, 20, 21), (30, 31, 32, 33, 34)),
        ((*stem, 20, 21), (30, 31, 40)),
        ((*stem, 20, 21), (30, 31)),
        ((*stem, 22), (41, 42, 43, 44)),
        ((*stem, 22), (41, 42, 43, 44)),
        ((50,), (51,)),
        ((60, 61, 62, 63, 64, 65, 66, 67, 68), (70, 71, 72, 73, 74, 75, 76, 77, 78)),
    ]
    return [
        make_scored(rollout_id=i, prompt=prompt, response=response, seed=seed, **scored)
        for i, (prompt, response) in enumerate(texts)
    ]


def weights(trainer: HFTrainer) -> dict[str, Tensor]:
    """A copy of everything that ``export`` gives."""
    return {
        name: tensor.clone()
        for bucket in trainer.export(bucket_bytes=1 << 20)
        for name, tensor in zip(bucket.names, bucket.tensors, strict=True)
    }


class PlainTrainer:
    """One sequence at a time, full logits, torch's own AdamW: everything in float64."""

    def __init__(self, folder: Path, *, objective: ObjectiveConfig | None = None, lr: float = CONFIG.lr) -> None:
        config = objective or ObjectiveConfig()
        self.model = load(folder, dtype=torch.float64)
        self._objective = make_objective(config)
        self._temperature, self._clamp = config.temperature, config.clamp
        parameters = list(self.model.parameters())
        self._adamw = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": CONFIG.weight_decay},
                {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=lr,
            betas=CONFIG.betas,
            eps=CONFIG.eps,
            foreach=False,
        )

    def step(self, scored: Sequence[Scored]) -> tuple[float, float]:
        """Mean loss per token and gradient norm."""
        values = torch.cat([self._divergence(item) for item in scored])
        self._adamw.zero_grad()
        torch.autograd.backward(values.mean())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CONFIG.grad_clip or float("inf"))
        self._adamw.step()
        return float(values.detach().mean()), float(norm)

    def _divergence(self, item: Scored) -> Tensor:
        return reference_divergence(
            self._objective,
            *self.rows(item),
            temperature=self._temperature,
            clamp=self._clamp,
            behaviour_logprobs=torch.tensor(item.rollout.sampling_logprobs),
        )

    def rows(self, item: Scored) -> tuple[Tensor, TeacherScores]:
        """Logits [T, V] that predict the response, and the scores as tensors."""
        rollout, scores = item.rollout, item.scores
        likely = top_ids_of(rollout)
        ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.response_ids]])
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits[0, -rollout.num_tokens - 1 : -1]
        return logits, TeacherScores(
            top_ids=torch.tensor(scores.top_ids),
            top_logprobs=torch.tensor(scores.top_logprobs),
            sampled_ids=torch.tensor(rollout.response_ids),
            sampled_logprobs=torch.tensor(scores.sampled_logprobs),
            extra_logprobs=None if scores.extra_logprobs is None else torch.tensor(scores.extra_logprobs),
            extra_ids=None if likely is None else torch.tensor(likely),
        )

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
