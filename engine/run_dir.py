"""The folder of a run: what lies where in it, and whether this recipe may use it.

recipe.json         the resolved recipe
events.jsonl        one line per fact (docs/events.md)
ledger.sqlite       every prompt occurrence and what became of it (engine/ledger.py)
metrics.jsonl       one line per optimizer step
evaluations.jsonl   held-out measurements
node.json           process id, host and port of the running node
summary.json        what the end of the run said
report.{html,md}    the same for people (engine/report.py)
ranks/rank_NNN.log   what each process of a Megatron learner wrote
checkpoints/step_NNNNNN/{student,trainer,state.json,manifest.json}
"""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import msgspec

from engine.errors import RecipeError, RunDirError
from engine.recipe import Recipe, describe, from_json

IDENTITY = ("name", "seed", "rollouts_per_step", "samples_per_prompt", "deterministic", "student", "data")
"""Parts of a recipe that a resumed run must not change: tickets, or the weights they were trained into, would mean
something else."""


class RunDir:
    """Paths of one run. Made by ``create`` or ``resume``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.json"
        self.events = path / "events.jsonl"
        self.ledger = path / "ledger.sqlite"
        self.metrics = path / "metrics.jsonl"
        self.evaluations = path / "evaluations.jsonl"
        self.node = path / "node.json"
        self.summary = path / "summary.json"
        self.report = path / "report.html"
        self.checkpoints = path / "checkpoints"
        self.ranks = path / "ranks"

    @classmethod
    def create(cls, path: Path) -> RunDir:
        """A new run's folder.

        Raises:
            RunDirError: it holds a run already, or cannot be written.
        """
        run = cls(path)
        if run.recipe.exists():
            raise RunDirError(
                f"{path} holds a run already; continue it with --resume --out {path}, or name another folder with --out"
            )
        run._make()
        return run

    @classmethod
    def resume(cls, path: Path, recipe: Recipe) -> RunDir:
        """The folder of an earlier run, or a new one when there is none: a scheduler that restarts what it killed need
        not know how far it came.

        Raises:
            RecipeError: the recipe differs from the earlier one where it must not.
            RunDirError: it cannot be written.
        """
        run = cls(path)
        if not run.recipe.exists():
            return cls.create(path)
        before = from_json(run.recipe.read_bytes())
        for field in IDENTITY:
            old, new = getattr(before, field), getattr(recipe, field)
            if old != new:
                raise RecipeError(
                    f"{path} was started with {field}={_text(old)}, this recipe says {_text(new)}; a resumed run must "
                    f"not change {', '.join(IDENTITY)}: start a new run, or take the change back"
                )
        return run

    def keep_recipe(self, recipe: Recipe) -> None:
        """Write ``recipe.json``. For the process that holds the run's ledger: another one may only be asking."""
        self.write(self.recipe, describe(recipe).encode() + b"\n")

    def write(self, path: Path, content: bytes) -> None:
        """Write one of the run's small files, aside and renamed: who reads it finds the old one or the new one.

        Raises:
            RunDirError: the disk is full or cannot be written.
        """
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            aside.write_bytes(content)
            aside.replace(path)
        except OSError as error:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
            raise RunDirError(f"cannot write {path}: {error.strerror}; make room, or mend its permissions") from error

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirError(
                f"cannot make the run's folder {self.path}: {error.strerror}; name a writable folder with --out"
            ) from error


def default_out(name: str, now: datetime, root: Path = Path("runs")) -> Path:
    """Where a new run goes when nobody says: ``runs/NAME-YYYYmmdd-HHMMSS``."""
    return root / f"{name}-{now:%Y%m%d-%H%M%S}"


def newest_run(name: str, root: Path = Path("runs")) -> Path | None:
    """The folder of the last run of this name that was started without ``--out``; None when there is none."""
    runs = sorted(path for path in root.glob(f"{name}-????????-??????") if (path / "recipe.json").exists())
    return runs[-1] if runs else None


def _text(value: object) -> str:
    return msgspec.json.encode(value).decode()
