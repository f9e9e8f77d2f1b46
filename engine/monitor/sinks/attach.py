"""Which sinks a recipe names, whether they can work here, and how they follow a run. The only place that knows all
sinks."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Self

from engine.errors import RecipeError
from engine.monitor.sinks.feed import Feed
from engine.monitor.sinks.tensorboard import TensorBoardSink
from engine.monitor.sinks.wandb import WandbSink, mode_of
from engine.recipe import Recipe
from engine.tracing import Tracing


class Sinks:
    """The sinks of one run, for the time of a ``with`` block; at its end they get ``sinks.flush_s`` to finish."""

    def __init__(self, recipe: Recipe, folder: Path, tracing: Tracing, *, step: int) -> None:
        """Args:
        folder: of the run.
        step: the run goes on after this optimizer step.
        """
        self._flush_s = recipe.sinks.flush_s
        self._tracing = tracing
        self._feeds = [Feed(sink, max_points=recipe.sinks.max_points) for sink in make_sinks(recipe, folder, step=step)]

    def __enter__(self) -> Self:
        for feed in self._feeds:
            feed.start()
            self._tracing.subscribe(f"sink {feed.name}", feed.apply)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for feed in self._feeds:
            feed.end(ok=kind is None)
        until = time.monotonic() + self._flush_s
        for feed in self._feeds:
            feed.join(max(0.0, until - time.monotonic()))


def make_sinks(recipe: Recipe, folder: Path, *, step: int) -> list[TensorBoardSink | WandbSink]:
    """Those that the recipe names, not yet open.

    Raises:
        RecipeError: WANDB_MODE in the environment is no mode.
    """
    config, folder = recipe.sinks, folder.absolute()
    sinks: list[TensorBoardSink | WandbSink] = []
    if config.tensorboard:
        shared = None if config.tensorboard is True else Path(config.tensorboard)
        own = folder / "tensorboard" if shared is None else shared / folder.name
        sinks.append(TensorBoardSink(folder=own, recipe=recipe, step=step))
    if config.wandb.project is not None and (mode := mode_of(config.wandb)) != "disabled":
        sinks.append(WandbSink(folder=folder, recipe=recipe, mode=mode))
    return sinks


def check_sinks(recipe: Recipe, folder: Path) -> str:
    """What was found of each sink, as one line.

    Raises:
        RecipeError: a package is missing or broken, a folder cannot be written, or nobody is logged in.
    """
    found, wrong = [], []
    for sink in make_sinks(recipe, folder, step=0):
        try:
            found.append(sink.check())
        except RecipeError as error:
            wrong.append(str(error))
    if wrong:
        raise RecipeError("; and ".join(wrong))
    return "; ".join(found) or "none: wandb is disabled"
