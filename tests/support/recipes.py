"""A recipe with sinks; what it trains does not matter."""

from __future__ import annotations

from typing import Any

from engine.recipe import DataConfig, LearnerConfig, LocalTeacher, Recipe, SinksConfig, StudentConfig


def recipe_with(**sinks: Any) -> Recipe:
    return Recipe(
        name="tiny",
        steps=6,
        student=StudentConfig(path="models/student"),
        teacher=LocalTeacher(model="models/teacher"),
        data=DataConfig(path="prompts.jsonl"),
        learner=LearnerConfig(lr=3e-4),
        sinks=SinksConfig(**sinks),
    )
