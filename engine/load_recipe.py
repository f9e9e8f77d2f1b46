"""From a Python file to a checked recipe and its graph."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import sys
import traceback
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from engine.build.standard import standard_graph
from engine.errors import RecipeError
from engine.graph import ActorSpec, ChannelSpec, Graph
from engine.recipe import Recipe, value_of, with_overrides

EditGraph = Callable[[Graph], Graph]


def load_recipe(path: Path, assignments: list[str]) -> tuple[Recipe, Graph]:
    """Run ``recipe()`` of the file, apply ``--set`` assignments, and make the graph of the result.

    An assignment to a parameter of ``recipe`` goes into the call, every other one to a field of what it returns.
    ``recipe()`` returns a ``Recipe``, or a ``Recipe`` and a function that changes the standard graph.

    Raises:
        RecipeError: the file cannot be read or run, returns something else, or the recipe cannot run as written.
    """
    returned, assignments = _call(path, assignments)
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
        with contextlib.redirect_stdout(sys.stderr):
            edited = edit(graph)
    except RecipeError:
        raise
    except BaseException as error:
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


def _call(path: Path, assignments: list[str]) -> tuple[object, list[str]]:
    """What ``recipe()`` returned, and the assignments that are not to its parameters."""
    try:
        is_file = path.is_file()
    except OSError as error:  # a name that is too long
        raise RecipeError(f"recipe {str(path)[:200]!r} cannot be read: {error.strerror}") from error
    if not is_file:
        raise RecipeError(f"recipe {str(path)!r} is not a file; expected a Python file with `def recipe() -> Recipe`")
    spec = importlib.util.spec_from_file_location(f"_recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"recipe {str(path)!r} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    # Registered, because msgspec and pickle-free type resolution look classes of the file up by module name.
    sys.modules[spec.name] = module
    try:
        # Standard output is the command's own: with --json it is one document, whatever the recipe prints.
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
            make = getattr(module, "recipe", None)
            if not callable(make):
                raise RecipeError(f"{path} defines no function recipe(); expected `def recipe() -> Recipe`")
            if inspect.iscoroutinefunction(make):
                raise RecipeError(f"{path}: recipe() is async; expected `def recipe() -> Recipe`, without async")
            arguments, rest = _arguments(make, assignments, path)
            return make(**arguments), rest
    except RecipeError:
        raise
    # A recipe that exits would end the command as if a run had been done; a signal does not pass here, it ends the
    # process (engine.run).
    except BaseException as error:
        raise RecipeError(f"{path}{_line_of(error, path)}: {_name_of(error)}") from error


def _arguments(make: Callable[..., object], assignments: list[str], path: Path) -> tuple[dict[str, Any], list[str]]:
    """Split ``--set`` into arguments of ``recipe()``, as their annotations say, and the rest.

    Raises:
        RecipeError: a value that its parameter does not take, or a name that means nothing.
    """
    parameters = inspect.signature(make).parameters
    types = typing.get_type_hints(make) if parameters else {}
    arguments: dict[str, Any] = {}
    rest = []
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        name = name.strip()
        if not separator or name not in parameters:
            if separator and parameters and name.partition(".")[0] not in Recipe.__struct_fields__:
                raise RecipeError(
                    f"--set {assignment}: {name!r} is neither a parameter of recipe() in {path}, which are "
                    f"{', '.join(parameters)}, nor a field of the recipe, which are "
                    f"{', '.join(Recipe.__struct_fields__)}"
                )
            rest.append(assignment)
            continue
        try:
            arguments[name] = msgspec.convert(value_of(text), types.get(name, Any), strict=False)
        except msgspec.ValidationError as error:
            expected = inspect.formatannotation(types.get(name, Any)).removeprefix("typing.")
            raise RecipeError(f"--set {assignment}: recipe() in {path} takes {name}: {expected}; {error}") from error
    return arguments, rest


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
