"""Everything that ``--simulate`` says of a recipe: the run itself, batch schedules beside it, and one more of each."""

from __future__ import annotations

from pathlib import Path

import msgspec

from engine.errors import UserError
from engine.graph import Graph
from engine.recipe import Recipe, ReplayConfig
from engine.simulate.baselines import baselines
from engine.simulate.fit import fit
from engine.simulate.lengths import Drawn, Lengths
from engine.simulate.result import Prediction
from engine.simulate.simulation import simulate
from engine.simulate.what_if import what_if


def predict(recipe: Recipe, graph: Graph, *, earlier_run: Path | None, out: Path | None) -> Prediction:
    """
    Args:
        earlier_run: folder of the run that costs and lengths are fitted to; None: the recipe's ``replay`` section.
        out: folder for the log of the simulated run.

    Raises:
        RunDirError: ``earlier_run`` tells too little, or ``out`` cannot be used.
        Deadlock, ActorFailed, RecipeError: as ``simulate``.
    """
    lengths: Lengths = Drawn(recipe)
    costs_from = "defaults" if recipe.replay == ReplayConfig() else "recipe"
    if earlier_run is not None:
        fitted = fit(earlier_run, recipe)
        recipe, lengths = msgspec.structs.replace(recipe, replay=fitted.costs), fitted.lengths
        costs_from = str(earlier_run)
    simulated = simulate(recipe, graph, lengths, out=out)
    return Prediction(
        **msgspec.structs.asdict(simulated),
        run=recipe.name,
        costs_from=costs_from,
        costs=msgspec.to_builtins(recipe.replay),
        one_more=what_if(recipe, graph, lengths, simulated),
        baselines=baselines(recipe, lengths),
    )


def refuse_other_options(named: dict[str, bool]) -> None:
    """A simulation neither goes on with a run nor looks at files.

    Args:
        named: option → whether it was given.

    Raises:
        UserError: one was.
    """
    given = [option for option, is_given in named.items() if is_given]
    if given:
        raise UserError(f"--simulate starts nothing and needs no files, so it does not go with {', '.join(given)}")
