"""Do generator and learner hold the same model? They are asked about the same tokens, and every so many versions.

A digest says that the bits arrived; this says that the engine computes with them, in whatever layout it keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from engine.actor import Caller
from engine.errors import WeightsMismatch
from engine.tracing import log


class Scorer(Protocol):
    """A generator that can be asked what it thinks of given tokens."""

    async def score(self, token_ids: tuple[int, ...]) -> list[float]:
        """Log-probability of each token but the first under the present weights, nats."""
        ...


class WeightProbe:
    """Compares on one sequence.

    Args:
        learner: as ``Scorer.score``, under the learner's weights; called in ``worker``.
        token_ids: at least two.
        every: versions from one comparison to the next.
        bound: largest difference that is rounding, nats.
    """

    def __init__(
        self,
        *,
        generator: Scorer,
        learner: Callable[[tuple[int, ...]], Sequence[float]],
        worker: Caller,
        token_ids: tuple[int, ...],
        every: int,
        bound: float,
    ) -> None:
        self._generator = generator
        self._learner = learner
        self._worker = worker
        self._token_ids = token_ids
        self._every = every
        self._bound = bound

    async def expect(self, version: int) -> Sequence[float] | None:
        """What the learner says, as long as it holds ``version``; None: this one is not compared."""
        if version % self._every:
            return None
        return await self._worker.call(self._learner, self._token_ids)

    async def verify(self, version: int, expected: Sequence[float]) -> None:
        """Ask the generator, which holds ``version``.

        Raises:
            WeightsMismatch: a log-probability differs by more than the bound.
        """
        found = await self._generator.score(self._token_ids)
        differences = [abs(a - b) for a, b in zip(expected, found, strict=True)]
        # Not ``max(...) > bound``: a NaN is a difference, too.
        bad = [at for at, difference in enumerate(differences) if not difference <= self._bound]
        if bad:
            at = max(bad, key=lambda at: differences[at])
            raise WeightsMismatch(
                f"version {version}: token {at + 1} of the first prompt has log-probability {found[at]:.6f} in the "
                f"sampler and {expected[at]:.6f} in the learner; weights.verify_bound={self._bound} is allowed. The "
                "sampler computes with other weights than it was sent, or in a coarser dtype than this bound suits"
            )
        log.info("weights.verified", version=version, difference=max(differences), num_tokens=len(differences))
