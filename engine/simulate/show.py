"""A prediction for people."""

from __future__ import annotations

from engine.recipe import Recipe
from engine.simulate.result import Prediction

_COST_SOURCES = {
    "recipe": "the recipe's replay section",
    "defaults": "defaults that fit no machine; set replay.… or fit them to a run with --simulate-from RUN_DIR",
}


def picture(prediction: Prediction, recipe: Recipe) -> str:
    """Lines of at most 100 columns."""
    lines = [
        f"{prediction.run}: {prediction.steps} steps of {recipe.rollouts_per_step} rollouts, at most "
        f"{recipe.max_staleness} versions old, simulated",
        f"costs: {_COST_SOURCES.get(prediction.costs_from, f'fitted to {prediction.costs_from}')}",
        "",
        f"learner utilisation   {prediction.learner_utilization:.1%}",
        f"throughput            {prediction.rollouts_per_s:.3g} rollouts/s, {prediction.tokens_per_s:,.0f} tokens/s",
        f"the run takes         {_duration(prediction.seconds)}",
        f"staleness             {_histogram(prediction.staleness)} (mean {prediction.mean_staleness:.2f} versions)",
        f"dropped               {prediction.num_dropped}",
        "",
        f"{'share of time':<24}{'worked':>8}{'no input':>10}{'no room':>9}",
    ]
    lines += [
        f"  {share.actor:<22}{share.worked:>8.0%}{share.waited_input:>10.0%}{share.waited_room:>9.0%}"
        + ("  bottleneck" if share.actor == prediction.bottleneck else "")
        for share in prediction.actors
    ]
    lines += ["", f"{'with one more':<24}{'rollouts/s':>12}{'gain':>9}  bottleneck"]
    lines += [
        f"  {name:<22}{more.rollouts_per_s:>12.3g}{more.gain:>+9.1%}  {more.bottleneck}"
        for name, more in prediction.one_more.items()
    ]
    lines += ["", f"{'batch by batch instead':<24}{'rollouts/s':>12}{'learner':>9}  staleness"]
    lines += [
        f"  {name.replace('_', '-'):<22}{batch.rollouts_per_s:>12.3g}{batch.learner_utilization:>9.1%}"
        f"  {batch.max_staleness_seen}"
        for name, batch in prediction.baselines.items()
    ]
    return "\n".join(lines)


def _histogram(staleness: dict[int, int]) -> str:
    total = sum(staleness.values()) or 1
    return ", ".join(f"{age}: {number / total:.0%}" for age, number in sorted(staleness.items()))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 72 else f"{hours / 24:.1f} days"
