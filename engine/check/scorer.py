"""A recipe's own function that scores held-out answers: found by name, and called as it will be called."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable

from engine.errors import RecipeError


def load_scorer(name: str) -> Callable[[str, str], float]:
    """ "module:function" → the function.

    Raises:
        RecipeError: there is no such thing, or it cannot be called.
    """
    module_name, _, function_name = name.partition(":")
    try:
        scorer = getattr(importlib.import_module(module_name), function_name)
    except (Exception, SystemExit) as error:  # importing runs the user's code
        raise RecipeError(
            f"evaluation.scorer={name!r} cannot be loaded: {type(error).__name__}: {error}; expected 'module:function'"
        ) from error
    if not callable(scorer):
        raise RecipeError(f"evaluation.scorer={name!r} is {type(scorer).__name__}, expected a function")
    try:
        signature = inspect.signature(scorer)
    except ValueError:  # some built-in functions have none
        return scorer  # type: ignore[no-any-return]
    try:
        signature.bind("prompt", "answer")
    except TypeError as error:
        raise RecipeError(
            f"evaluation.scorer={name!r} has the signature {signature}, expected one that takes "
            f"(prompt: str, answer: str): {error}"
        ) from error
    return scorer  # type: ignore[no-any-return]
