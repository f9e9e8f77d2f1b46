"""What a recipe asks for in all: the longest text, the largest K, how answers are drawn. Looks at nothing outside."""

from __future__ import annotations

from engine.recipe import Recipe
from engine.types import SamplingParams


def longest(recipe: Recipe) -> int:
    """Tokens of prompt and answer together that the recipe allows."""
    most = recipe.data.max_prompt_tokens + recipe.sampler.max_new_tokens
    if recipe.evaluation is not None:
        new_tokens = recipe.evaluation.max_new_tokens or recipe.sampler.max_new_tokens
        most = max(most, recipe.evaluation.data.max_prompt_tokens + new_tokens)
    return most


def wanted_top_k(recipe: Recipe) -> int:
    """The most that is asked of the teacher."""
    return max(recipe.teacher.top_k, (recipe.evaluation.top_k or 0) if recipe.evaluation else 0)


def sampling_params(recipe: Recipe, *, stop_ids: tuple[int, ...]) -> SamplingParams:
    """How answers are drawn.

    Args:
        stop_ids: of the model, where the recipe names none.
    """
    sampler = recipe.sampler
    return SamplingParams(
        max_new_tokens=sampler.max_new_tokens,
        temperature=sampler.temperature,
        top_p=sampler.top_p,
        top_k=sampler.top_k,
        stop_ids=stop_ids if sampler.stop_ids is None else sampler.stop_ids,
        num_top_ids=recipe.objective.num_top_ids,
    )
