"""The learning rate of each optimizer step: a pure function of the step."""

from __future__ import annotations

import math

from engine.recipe import LearnerConfig


def learning_rate(config: LearnerConfig, *, step: int, num_steps: int) -> float:
    """Learning rate of ``step``, which counts from 1 to ``num_steps``.

    Warm-up is linear from 0 (before the first step) to ``config.lr`` in step ``config.warmup_steps``. Cosine falls from
    there to ``config.min_lr_share`` of it, reached one step after the last: a step at rate 0 would train nothing.
    Steps beyond ``num_steps`` stay at the end of the schedule.

    Raises:
        ValueError: ``step`` is less than 1.
    """
    if step < 1:
        raise ValueError(f"steps count from 1, got {step}")
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    peak = max(config.warmup_steps, 1)
    progress = min((step - peak) / (num_steps + 1 - peak), 1.0) if num_steps >= peak else 1.0
    share = config.min_lr_share + (1.0 - config.min_lr_share) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * share
