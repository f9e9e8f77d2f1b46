"""What a simulation says of a schedule: the same numbers for the real one and for those that it is compared with."""

from __future__ import annotations

import msgspec

SERIAL, ONE_STEP_OFF, TWO_STEP_OFF = "serial", "one_step_off", "two_step_off"


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """What an actor's time went to; the three add up to 1."""

    actor: str
    worked: float
    waited_input: float
    waited_room: float


class Simulated(msgspec.Struct, frozen=True, kw_only=True):
    """One schedule, from the run's begin to its end."""

    learner_utilization: float
    """Share of the time in which the learner computes: micro-batches and optimizer."""
    rollouts_per_s: float
    """Trained."""
    tokens_per_s: float
    """Response tokens trained."""
    max_staleness_seen: int
    """Versions."""
    mean_staleness: float
    staleness: dict[int, int]
    """Trained rollouts by age in versions."""
    num_dropped: int
    """Rollouts that were begun and never trained."""
    bottleneck: str
    """The actor that worked the largest share of the time."""
    seconds: float
    """Virtual, in all."""
    steps: int
    num_rollouts: int
    """Trained."""
    cpu_s_per_rollout: float
    """Real CPU seconds that the simulation itself took."""
    actors: tuple[Share, ...] = ()


class OneMore(msgspec.Struct, frozen=True, kw_only=True):
    """The same run with one more of something."""

    rollouts_per_s: float
    learner_utilization: float
    gain: float
    """Rollouts per second, relative to the run without it; 0.1: a tenth more."""
    bottleneck: str


class Prediction(Simulated, frozen=True, kw_only=True):
    """What ``--simulate --json`` prints."""

    run: str
    costs_from: str
    """"recipe", "defaults", or the folder of the run that they were fitted to."""
    costs: dict[str, object]
    """Every number of the replay section that was used."""
    one_more: dict[str, OneMore]
    """By ``sampler``, ``teacher`` and ``learner``."""
    baselines: dict[str, Simulated]
    """Batch schedules over the same costs and lengths."""


def mean_age(staleness: dict[int, int]) -> float:
    total = sum(staleness.values())
    return sum(age * number for age, number in staleness.items()) / total if total else 0.0
