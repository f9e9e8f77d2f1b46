"""A workload for ``--simulate``: answers of very different lengths, as reasoning models give them. It has no models and
cannot be run.

    python -m engine.run recipes/replay_longtail.py --simulate
    python -m engine.run recipes/replay_longtail.py --simulate --set workload=even --set max_staleness=1

Each batch has one answer that is many times longer than the others, and a schedule of batches waits for it.
``generation_bound``: generation takes longer than teacher and learner together. ``even``: teacher and learner are each
as slow as generation, so that every second in which one of them waits for the other is lost.
"""

from __future__ import annotations

from typing import Literal

from engine.recipe import (
    CheckpointConfig,
    DataConfig,
    LearnerConfig,
    LocalTeacher,
    Recipe,
    ReplayConfig,
    SamplerConfig,
    StudentConfig,
)

ROLLOUTS_PER_STEP = 128
PROMPT_TOKENS = 512
MEAN_ANSWER_TOKENS = 1455
"""Of lognormal(6.9, 0.9), clipped to 16 … 8192."""
OPTIMIZER_S = 1.0

OCCUPIED_S = {"generation_bound": (25.0, 40.0), "even": (99.0, 99.0)}
"""Seconds that a mean batch occupies the teacher, and the learner with its optimizer step."""


def recipe(workload: Literal["generation_bound", "even"] = "generation_bound") -> Recipe:
    teacher_s, learner_s = OCCUPIED_S[workload]
    batch_tokens = ROLLOUTS_PER_STEP * (PROMPT_TOKENS + MEAN_ANSWER_TOKENS)
    return Recipe(
        name="replay_longtail",
        steps=40,
        student=StudentConfig(path="no-model"),
        teacher=LocalTeacher(model="no-model"),
        data=DataConfig(path="no-prompts.jsonl", max_prompt_tokens=PROMPT_TOKENS),
        max_staleness=2,
        rollouts_per_step=ROLLOUTS_PER_STEP,
        sampler=SamplerConfig(max_new_tokens=8192, num_slots=128),
        # Micro-batches of eight rollouts, whatever their lengths.
        learner=LearnerConfig(micro_batch_rollouts=8, micro_batch_tokens=1 << 20),
        checkpoint=CheckpointConfig(every_steps=0),
        replay=ReplayConfig(
            decode_step_s=0.012,
            decode_slot_s=40e-6,
            weights_pause_s=2.0,
            teacher_token_s=teacher_s / batch_tokens,
            teacher_latency_s=0.025,
            learner_token_s=(learner_s - OPTIMIZER_S) / batch_tokens,
            optimizer_s=OPTIMIZER_S,
            length_mu=6.9,
            length_sigma=0.9,
            length_min=16,
            length_max=8192,
            prompt_tokens=PROMPT_TOKENS,
        ),
    )
