"""What one more sampler, teacher replica or learner would bring: each is simulated, nothing is extrapolated."""

from __future__ import annotations

import msgspec

from engine.build.parts import num_replicas
from engine.graph import Graph
from engine.recipe import Recipe
from engine.simulate.lengths import Lengths
from engine.simulate.result import OneMore, Simulated
from engine.simulate.simulation import simulate

_MAX_ROLLOUTS = 10_000
"""Beyond this a comparison is made over fewer steps: the pace of a schedule shows after a few of them."""
_MIN_STEPS = 4


def what_if(recipe: Recipe, graph: Graph, lengths: Lengths, simulated: Simulated) -> dict[str, OneMore]:
    """
    Args:
        simulated: ``recipe`` as it is.
    """
    steps = min(recipe.steps, max(_MIN_STEPS, _MAX_ROLLOUTS // recipe.rollouts_per_step))
    if steps < recipe.steps:
        recipe = msgspec.structs.replace(recipe, steps=steps)
        simulated = simulate(recipe, graph, lengths)
    replay = recipe.replay
    changes = {
        "sampler": {"num_samplers": replay.num_samplers + 1},
        "teacher": {"num_teachers": (replay.num_teachers or num_replicas(recipe)) + 1},
        "learner": {"num_learners": replay.num_learners + 1},
    }
    return {
        name: _compare(
            simulated,
            simulate(msgspec.structs.replace(recipe, replay=msgspec.structs.replace(replay, **change)), graph, lengths),
        )
        for name, change in changes.items()
    }


def _compare(before: Simulated, after: Simulated) -> OneMore:
    return OneMore(
        rollouts_per_s=after.rollouts_per_s,
        learner_utilization=after.learner_utilization,
        gain=after.rollouts_per_s / before.rollouts_per_s - 1.0 if before.rollouts_per_s else 0.0,
        bottleneck=after.bottleneck,
    )
