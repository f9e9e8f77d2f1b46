"""Everything that a report is made from, read from the folder of a run. Nothing is changed there, so that a live run
may be read; what is missing or broken is said and left out."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from engine.checkpoint import STATE_FILE, CheckpointStore
from engine.errors import RunDirError
from engine.evaluations import Evaluation, read_evaluations
from engine.monitor.log_files import LogFile, find_logs, merged
from engine.monitor.report.history import History
from engine.run_dir import RunDir
from engine.tracing import Event


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """The newest checkpoint in place."""

    step: int
    path: Path
    num_bytes: int
    has_student: bool
    packages: Mapping[str, str]
    """Versions that wrote it; empty when it does not say."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    folder: Path
    history: History
    recipe: Mapping[str, Any]
    """``recipe.json`` as it is; empty when it cannot be read."""
    recipe_problem: str
    evaluations: list[Evaluation]
    """Of the run as it stands, by version."""
    saved: Saved | None
    num_unreadable: int
    """Lines of the log."""
    is_alive: bool | None
    """Whether the last process still exists; None: it ran on another machine, or did not say."""


def gather(folder: Path) -> Facts:
    """Read the folder of a run, once.

    Raises:
        RunDirError: it is missing, is no run's folder, or cannot be read.
    """
    run_dir = RunDir(folder)
    files = [LogFile(path) for path in find_logs(folder)]
    history = History()
    num_lines = 0
    for line in merged(files):
        history.apply(line.source, line.fields)
        num_lines += 1
    history.end()
    recipe, problem = _recipe(run_dir.recipe)
    if not num_lines and not recipe:
        raise RunDirError(
            f"{folder} holds no run: there is no line of a log in it, and {problem}; give the folder of a run, the one "
            "that holds recipe.json and events.jsonl"
        )
    return Facts(
        folder=folder,
        history=history,
        recipe=recipe,
        recipe_problem=problem,
        evaluations=history.evaluations(_evaluations(run_dir.evaluations)),
        saved=_saved(run_dir.checkpoints),
        num_unreadable=sum(file.num_left_out for file in files),
        is_alive=_is_alive(history.last.opened),
    )


def _recipe(path: Path) -> tuple[Mapping[str, Any], str]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any]), ""
    except FileNotFoundError:
        return {}, "there is no recipe.json"
    except OSError as error:
        return {}, f"recipe.json cannot be read ({error.strerror})"
    except (msgspec.DecodeError, RecursionError) as error:
        return {}, f"recipe.json cannot be understood ({error})"


def _evaluations(path: Path) -> list[Evaluation]:
    try:
        return read_evaluations(path)
    except OSError:
        return []  # the log has the numbers, too


def _saved(folder: Path) -> Saved | None:
    try:
        steps = CheckpointStore(folder).steps()
        if not steps:
            return None
        path = folder / f"step_{steps[-1]:06d}"
        num_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    except OSError:  # a live run may remove it while we look
        return None
    return Saved(
        step=steps[-1],
        path=path,
        num_bytes=num_bytes,
        has_student=(path / "student" / "config.json").is_file(),
        packages=_packages(path / STATE_FILE),
    )


class _State(msgspec.Struct):
    """What is read of a checkpoint's ``state.json``."""

    packages: dict[str, str] = {}


def _packages(path: Path) -> Mapping[str, str]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_State).packages
    except (OSError, msgspec.DecodeError, RecursionError):
        return {}


def _is_alive(opened: Event) -> bool | None:
    pid = opened.get("pid")
    if not isinstance(pid, int) or pid < 1 or opened.get("host") != socket.gethostname():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return None
    return True
