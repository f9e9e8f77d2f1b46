"""A run of tiny models that does everything and costs nearly nothing; the benches set paths and steps."""

from __future__ import annotations

from engine.recipe import (
    CheckpointConfig,
    DataConfig,
    LearnerConfig,
    LocalTeacher,
    Recipe,
    SamplerConfig,
    StudentConfig,
)


def recipe() -> Recipe:
    return Recipe(
        name="tiny",
        steps=1,
        student=StudentConfig(path="set by the bench"),
        teacher=LocalTeacher(model="set by the bench"),
        data=DataConfig(path="set by the bench", max_prompt_tokens=64),
        max_staleness=1,
        rollouts_per_step=8,
        sampler=SamplerConfig(max_new_tokens=16, num_slots=16),
        learner=LearnerConfig(micro_batch_tokens=1024),
        checkpoint=CheckpointConfig(every_steps=50, keep=1),
    )
