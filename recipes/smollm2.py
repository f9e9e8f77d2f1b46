"""The demo: a pruned SmolLM2-135M learns to answer like the whole one, on a CPU, in minutes.

The student is the teacher without six of its thirty layers. Cut like that it speaks haltingly; on-policy distillation
repairs it. The teacher runs as its own process:

    python -m recipes.smollm2_models --out models/smollm2
    python -m teacher --model models/smollm2/teacher --port 8765 &
    python -m engine.run recipes/smollm2.py

or all of it, and the stopping afterwards: ``make demo``. With the learner on Megatron-core instead of plain torch
(extra ``megatron``):

    python -m engine.run recipes/smollm2.py --set trainer=megatron
"""

from __future__ import annotations

from typing import Literal

import msgspec

from engine.megatron_config import MegatronConfig
from engine.recipe import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    HttpTeacher,
    LearnerConfig,
    Recipe,
    SamplerConfig,
    StudentConfig,
    WeightsConfig,
)


def recipe(steps: int = 72, trainer: Literal["torch", "megatron"] = "torch") -> Recipe:
    """``--set steps=N`` comes in here, so that the warm-up fits into a run that is a look and no more."""
    learner = LearnerConfig(
        lr=3e-4,
        schedule="cosine",
        warmup_steps=min(3, steps),
        min_lr_share=0.1,
        # One micro-batch a step: the chat template's system prompt is then computed once for all eight rollouts.
        micro_batch_tokens=1024,
        autocast="auto",
    )
    if trainer == "megatron":
        learner = msgspec.structs.replace(learner, backend="megatron", megatron=MegatronConfig(dtype="float32"))
    return Recipe(
        name="smollm2",
        steps=steps,
        student=StudentConfig(path="models/smollm2/student"),
        # The top 256 hold 94 % of the teacher's probability on the student's answers, the top 64 only 87 %.
        teacher=HttpTeacher(urls=("http://127.0.0.1:8765",), top_k=256),
        # The last 16 of the 128 rows are held out. The longest prompt has 46 tokens with its chat template.
        data=DataConfig(path="recipes/data/prompts.jsonl", num_rows=112, max_prompt_tokens=64),
        max_staleness=3,
        rollouts_per_step=8,
        # A decode step of 16 answers takes little longer than one of 8. What begins sixteen at a time is trained two
        # and three steps later.
        sampler=SamplerConfig(max_new_tokens=48, temperature=1.0, num_slots=16, min_wave=16, dtype="auto"),
        learner=learner,
        # A new version comes every few seconds and an answer is 48 tokens: computing its keys and values again at each
        # switch would cost more than it brings.
        weights=WeightsConfig(kv_cache="keep"),
        evaluation=EvalConfig(
            data=DataConfig(
                path="models/smollm2/held_out.jsonl",
                reference_column="teacher_answer",
                reference_ends=False,
                max_prompt_tokens=64,
            ),
            # Within 2 % of the divergence over the whole vocabulary.
            top_k=4096,
            samples_per_prompt=2,
        ),
        # One holds the student and two optimizer moments: 1.4 GB.
        checkpoint=CheckpointConfig(every_steps=36, keep=1),
    )
