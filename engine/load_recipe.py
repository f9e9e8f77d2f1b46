"""From a Python file to a checked recipe and its graph."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from engine.build import standard_graph
from engine.errors import RecipeError
from engine.graph import Graph
from engine.recipe import Recipe, with_overrides

EditGraph = Callable[[Graph], Graph]


def load_recipe(path: Path, assignments: list[str]) -> tuple[Recipe, Graph]:
    """Run ``recipe()`` of the file, apply ``--set`` assignments, and make the graph of the result.

    ``recipe()`` returns a ``Recipe``, or a ``Recipe`` and a function that changes the standard graph.

    Raises:
        RecipeError: the file cannot be read or run, returns something else, or the recipe cannot run as written.
    """
    returned = _call(path)
    edit: EditGraph | None = None
    if isinstance(returned, tuple) and len(returned) == 2 and callable(returned[1]):
        returned, edit = returned
    if not isinstance(returned, Recipe):
        raise RecipeError(
            f"{path}: recipe() returned {type(returned).__name__}, expected a Recipe, or a Recipe and a function "
            "Graph -> Graph"
        )
    recipe = with_overrides(returned, assignments)
    graph = standard_graph(recipe)
    if edit is not None:
        graph = edit(graph)
        if not isinstance(graph, Graph):
            raise RecipeError(
                f"{path}: the function beside the recipe returned {type(graph).__name__}, expected a Graph"
            )
    graph.check()
    return recipe, graph


def _call(path: Path) -> object:
    if not path.is_file():
        raise RecipeError(f"recipe {str(path)!r} is not a file; expected a Python file with `def recipe() -> Recipe`")
    spec = importlib.util.spec_from_file_location(f"_recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"recipe {str(path)!r} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    # Registered, because msgspec and pickle-free type resolution look classes of the file up by module name.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        make = getattr(module, "recipe", None)
        if not callable(make):
            raise RecipeError(f"{path} defines no function recipe(); expected `def recipe() -> Recipe`")
        return make()
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(f"{path}{_line_of(error, path)}: {type(error).__name__}: {error}") from error


def _line_of(error: Exception, path: Path) -> str:
    """ ":LINE" of the recipe file where the error came from."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f":{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f":{lines[-1]}" if lines else ""
