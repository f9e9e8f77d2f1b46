"""From a Python file to a checked recipe and its graph."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from engine.build import standard_graph
from engine.errors import RecipeError
from engine.graph import ActorSpec, ChannelSpec, Graph
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
        graph = _edited(graph, edit, path)
    graph.check()
    return recipe, graph


def _edited(graph: Graph, edit: EditGraph, path: Path) -> Graph:
    try:
        edited = edit(graph)
    except RecipeError:
        raise
    except (Exception, SystemExit) as error:
        raise RecipeError(f"{path}{_line_of(error, path)}: {_name_of(error)}, in the graph function") from error
    if not isinstance(edited, Graph):
        raise RecipeError(f"{path}: the function beside the recipe returned {type(edited).__name__}, expected a Graph")
    for field, kind in (("actors", ActorSpec), ("channels", ChannelSpec)):
        listed = getattr(edited, field)
        if not isinstance(listed, tuple) or not all(isinstance(spec, kind) for spec in listed):
            raise RecipeError(
                f"{path}: the graph's {field} are {listed!r:.200}, expected a tuple of {kind.__name__}; change the "
                "graph with insert, or with msgspec.structs.replace"
            )
    return edited


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
    # A recipe that exits would end the command as if a run had been done.
    except (Exception, SystemExit) as error:
        raise RecipeError(f"{path}{_line_of(error, path)}: {_name_of(error)}") from error


def _line_of(error: BaseException, path: Path) -> str:
    """ ":LINE" of the recipe file where the error came from."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f":{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f":{lines[-1]}" if lines else ""


def _name_of(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"it called sys.exit({error.code!r}); raise an error instead"
    return f"{type(error).__name__}: {error}"
