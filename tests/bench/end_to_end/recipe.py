"""Our side of ``bench_end_to_end``: what anybody would write for these models; the bench sets paths, steps and top-k.

Strictly on-policy (``max_staleness=0``), as the rivals are. One micro-batch holds the whole step.
"""

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
from tests.bench.end_to_end.workload import BETAS, GRAD_CLIP, LR, NEW_TOKENS, NUM_PROMPTS, PROMPT_TOKENS

_STEP_TOKENS = NUM_PROMPTS * (PROMPT_TOKENS[1] + NEW_TOKENS)


def recipe() -> Recipe:
    return Recipe(
        name="bench",
        steps=1,
        student=StudentConfig(path="set by the bench"),
        teacher=LocalTeacher(model="set by the bench", top_k=64, max_batch_tokens=_STEP_TOKENS),
        data=DataConfig(path="set by the bench", chat=False, max_prompt_tokens=PROMPT_TOKENS[1]),
        max_staleness=0,
        rollouts_per_step=NUM_PROMPTS,
        sampler=SamplerConfig(max_new_tokens=NEW_TOKENS, num_slots=NUM_PROMPTS, stop_ids=()),
        learner=LearnerConfig(lr=LR, betas=BETAS, grad_clip=GRAD_CLIP, micro_batch_tokens=_STEP_TOKENS, autocast="off"),
        checkpoint=CheckpointConfig(every_steps=0, keep=1),
    )
