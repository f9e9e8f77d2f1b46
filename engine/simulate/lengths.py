"""How long prompts and answers are in a simulation: drawn from a distribution, or those of an earlier run again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Protocol

from engine.recipe import Recipe
from engine.streams import stream_key, uniform

_STANDARD = NormalDist()


class Lengths(Protocol):
    """Tokens by ticket; equal tickets give equal lengths, whatever the schedule."""

    def prompt(self, ticket: int) -> int: ...

    def answer(self, ticket: int) -> int: ...


class Drawn:
    """Lognormal answers as the recipe's ``replay`` section says, each from the random stream of its ticket."""

    def __init__(self, recipe: Recipe) -> None:
        replay = recipe.replay
        self._longest = min(replay.length_max or recipe.sampler.max_new_tokens, recipe.sampler.max_new_tokens)
        self._shortest = min(replay.length_min, self._longest)
        self._mu = math.log(max(1, self._longest / 2)) if replay.length_mu is None else replay.length_mu
        self._sigma = replay.length_sigma
        self._prompt = replay.prompt_tokens or max(1, recipe.data.max_prompt_tokens // 2)
        self._seed = recipe.seed

    def prompt(self, ticket: int) -> int:
        return self._prompt

    def answer(self, ticket: int) -> int:
        # The draw itself may be 0, where the normal distribution has no quantile.
        share = max(uniform(stream_key("length", self._seed, ticket)), 2.0**-60)
        exponent = min(self._mu + self._sigma * _STANDARD.inv_cdf(share), 100.0)  # e^710 overflows
        return min(max(int(math.exp(exponent)), self._shortest), self._longest)


class Observed:
    """Those of an earlier run in the order of its tickets, and then again from its first one.

    Args:
        pairs: tokens of prompt and answer, at least one pair.
        longest: no answer is longer.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]], *, longest: int) -> None:
        self._pairs = pairs
        self._longest = longest

    def prompt(self, ticket: int) -> int:
        return self._pairs[ticket % len(self._pairs)][0]

    def answer(self, ticket: int) -> int:
        return min(self._pairs[ticket % len(self._pairs)][1], self._longest)
