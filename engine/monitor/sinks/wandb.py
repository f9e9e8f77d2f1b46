"""Weights & Biases, through the package ``wandb`` (an extra): its server, or a folder to be sent there later.
Decides how points and recipe look there."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import RecipeError
from engine.metric_catalogue import EVALUATION_METRICS, OBJECTIVE_METRICS, STEP_METRICS
from engine.monitor.sinks.points import EVALUATION, TRAIN, Point, describe
from engine.recipe import Recipe, WandbConfig

_NAMES = (
    *(TRAIN + metric.name for metric in (*STEP_METRICS, *OBJECTIVE_METRICS)),
    *(EVALUATION + metric.name for metric in EVALUATION_METRICS),
)
_MODES = {"online": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}


def mode_of(config: WandbConfig) -> str:
    """ "online", "offline" or "disabled": what the recipe says, else WANDB_MODE in the environment, else "online".

    Raises:
        RecipeError: WANDB_MODE is none of these.
    """
    named = config.mode or os.environ.get("WANDB_MODE") or "online"
    if named not in _MODES:
        raise RecipeError(
            f"WANDB_MODE={named!r} in the environment, expected one of {', '.join(_MODES)}; mend it, or set "
            "sinks.wandb.mode"
        )
    return _MODES[named]


class WandbSink:
    """Satisfies ``engine.monitor.sinks.feed.Sink``.

    A resumed run goes on in the same run of W&B. Points carry their step as a value of their own: the counter that W&B
    keeps never goes back, as a run that is resumed from a checkpoint does.

    Args:
        folder: of the run; W&B writes into ``wandb/`` beneath it.
        mode: "online" or "offline".
    """

    name = "wandb"

    def __init__(self, *, folder: Path, recipe: Recipe, mode: str) -> None:
        self._folder = folder
        self._recipe = recipe
        self._mode = mode
        self._run: Any = None

    def check(self) -> str:
        """One line of what was found. Imports what a run needs: not at the same time as others import, later.

        Raises:
            RecipeError: the package is missing or broken, or nobody is logged in who could send.
        """
        try:
            wandb = _import()
        except Exception as error:  # a broken installation may raise anything: ImportError, TypeError of protobuf
            raise RecipeError(
                f"sinks.wandb needs the package wandb, which cannot be imported here ({error}); "
                "pip install 'slipstream[wandb]', or set sinks.wandb.project=null"
            ) from error
        if self._mode == "online":
            self._check_login(wandb)
        return f"wandb {wandb.__version__}, {self._mode}, project {self._recipe.sinks.wandb.project}"

    def _check_login(self, wandb: Any) -> None:
        try:
            is_logged_in = wandb.login(prompt=False, verify=False)
        except Exception as error:  # UsageError, AuthenticationError and what settings files bring about
            raise RecipeError(f"sinks.wandb: {error}; mend the key, or set sinks.wandb.mode=offline") from error
        if not is_logged_in:
            raise RecipeError(
                "sinks.wandb would send to the server, and nobody is logged in; run `wandb login`, set WANDB_API_KEY, "
                "or set sinks.wandb.mode=offline"
            )

    def open(self) -> str:
        wandb, config = _import(), self._recipe.sinks.wandb
        patience_s = 0.8 * self._recipe.sinks.flush_s
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group,
            tags=config.tags,
            name=self._folder.name,
            dir=self._folder,
            id=_run_id(self._folder / "wandb" / "id"),
            resume="allow" if self._mode == "online" else None,
            mode=self._mode,
            config={**msgspec.to_builtins(self._recipe), "metrics": {name: describe(name) for name in _NAMES}},
            settings=wandb.Settings(
                console="off",
                silent=True,
                # Sooner than the feed gives up: the library then knows what it has not sent, and keeps it.
                init_timeout=patience_s,
                finish_timeout=patience_s,
                finish_timeout_raises=True,
            ),
        )
        self._run.define_metric("*", step_metric="step")
        return str(Path(self._run.dir).parent if self._mode == "offline" else self._run.url)

    def write(self, point: Point) -> None:
        self._run.log({"step": point.step, "time": point.at_s, **point.values})

    def flush(self) -> None:
        """Nothing to do: the library writes from a process of its own as points come."""

    def close(self, *, ok: bool) -> None:
        self._run.finish(exit_code=0 if ok else 1)


def _import() -> Any:
    # Read when the library wakes up. The terminal belongs to the picture of the run, and what goes wrong inside the
    # library is not told to its makers from here.
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb


def _run_id(path: Path) -> str:
    """The name by which W&B knows this run for good, also when it is resumed."""
    with contextlib.suppress(FileNotFoundError):
        if re.fullmatch(r"[0-9a-f]{16}", known := path.read_text().strip()):
            return known
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(made := secrets.token_hex(8))
    return made
