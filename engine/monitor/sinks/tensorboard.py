"""TensorBoard event files, written with the package ``tensorboard`` (an extra) and without TensorFlow. Decides how
points and recipe look there."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import RecipeError
from engine.monitor.sinks.points import EVALUATION, TRAIN, Point, describe
from engine.recipe import Recipe
from engine.recipe import describe as describe_recipe

_COMPARED = (EVALUATION + "kl", EVALUATION + "reference_kl", TRAIN + "loss")
"""Columns of the HPARAMS page, beside the settings."""


class TensorBoardSink:
    """Satisfies ``engine.monitor.sinks.feed.Sink``.

    Args:
        folder: made when it is not there. A resumed run adds a file to it.
        step: the run goes on after this step: what an earlier process wrote of later ones is hidden.
    """

    name = "tensorboard"

    def __init__(self, *, folder: Path, recipe: Recipe, step: int) -> None:
        self.folder = folder
        self._recipe = recipe
        self._step = step
        self._writer: Any = None
        self._described: set[str] = set()

    def check(self) -> str:
        """One line of what was found. Imports what a run needs: not at the same time as others import, later.

        Raises:
            RecipeError: the package is missing or broken, or the folder cannot be written.
        """
        try:
            import tensorboard
            from torch.utils.tensorboard import FileWriter  # noqa: F401
        except Exception as error:  # a broken installation may raise anything: ImportError, TypeError of protobuf
            raise RecipeError(
                f"sinks.tensorboard needs the package tensorboard, which cannot be imported here ({error}); "
                "pip install 'slipstream[tensorboard]', or set sinks.tensorboard=false"
            ) from error
        existing = self.folder
        while not os.path.exists(existing):  # unlike Path.exists: also where a folder on the way may not be looked into
            existing = existing.parent
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise RecipeError(
                f"sinks.tensorboard: {self.folder} cannot be written, {existing} is "
                f"{'read-only' if existing.is_dir() else 'a file'}; name another folder"
            )
        return f"tensorboard {tensorboard.__version__} in {self.folder}"

    def open(self) -> str:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from torch.utils.tensorboard import FileWriter
        from torch.utils.tensorboard.summary import hparams, text

        self._writer = FileWriter(str(self.folder))
        # Also at step 0: a run that was killed before its first checkpoint begins anew.
        self._writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), self._step + 1)
        settings = dict(_flat(msgspec.to_builtins(self._recipe), ""))
        experiment, session, _ = hparams(settings, dict.fromkeys(_COMPARED, 0.0))  # type: ignore[no-untyped-call]
        recipe = text("recipe", f"```json\n{describe_recipe(self._recipe)}\n```")  # type: ignore[no-untyped-call]
        for summary in (experiment, session, recipe):
            self._writer.add_summary(summary, self._step, time.time())
        self._writer.flush()
        return str(self.folder)

    def write(self, point: Point) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

        values = []
        for name, value in point.values.items():
            metadata = None
            if name not in self._described:  # the first value of a series carries what is said of all
                self._described.add(name)
                plugin = SummaryMetadata.PluginData(plugin_name="scalars")
                metadata = SummaryMetadata(summary_description=describe(name), plugin_data=plugin)
            values.append(Summary.Value(tag=name, simple_value=value, metadata=metadata))
        self._writer.add_summary(Summary(value=values), point.step, point.at_s)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, *, ok: bool) -> None:
        self._writer.close()


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float | str]]:
    """``{"learner": {"lr": 0.1}}`` as ``("learner.lr", 0.1)``; TensorBoard compares numbers and texts."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
            yield prefix + key, value
        elif value is not None:
            yield prefix + key, msgspec.json.encode(value).decode()
