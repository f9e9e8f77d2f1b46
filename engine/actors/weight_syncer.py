"""Brings each new policy version to the generator and says when it is live. Does not decide when versions are made."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from engine.actor import Actor, Caller
from engine.actors.weight_probe import WeightProbe
from engine.errors import GeneratorDied
from engine.generation.protocol import Generator
from engine.recipe import WeightsConfig
from engine.schedule import Schedule
from engine.tracing import log, span
from engine.training.protocol import Trainer
from engine.transport.channel import Receiver


class WeightPush:
    """Gives the generator the learner's present weights; called by the syncer, and by a sampler that had to start
    again.

    The learner goes on with the next step's forward and backward while a version travels: those only read the weights.
    ``weights_lock`` keeps its optimizer away until the last tensor is copied. ``worker`` is where the digest is made:
    not the learner's thread, which is busy. With a ``probe``, what has arrived is compared before it goes live.
    """

    def __init__(
        self,
        *,
        generator: Generator,
        trainer: Trainer,
        schedule: Schedule,
        config: WeightsConfig,
        weights_lock: asyncio.Lock,
        worker: Caller,
        probe: WeightProbe | None = None,
    ) -> None:
        self._worker = worker
        self._probe = probe
        self._generator = generator
        self._trainer = trainer
        self._schedule = schedule
        self._config = config
        self._weights_lock = weights_lock

    async def __call__(self) -> None:
        """Return when the generator holds them and the schedule knows.

        Raises:
            GeneratorDied: the engine is gone.
            WeightsMismatch: what arrived is not what was sent, or the generator makes something else of it.
        """
        expected = None
        async with self._weights_lock:
            version = self._trainer.version
            with span("weights.push", version=version) as facts:
                digest = await self._worker.call(self._trainer.digest)
                buckets = self._trainer.export(bucket_bytes=self._config.bucket_bytes)
                await self._generator.update_weights(version, buckets, config=self._config, digest=digest)
                facts.add(digest=digest)
                if self._probe is not None:
                    expected = await self._probe.expect(version)
        if self._probe is not None and expected is not None:
            await self._probe.verify(version, expected)
        self._schedule.weights_live(version)


class WeightSyncer(Actor):
    """The way back.

    Consumes: policy versions from ``versions``
        waits for:     an optimizer step
        unblocked by:  Learner.run sending a version
    """

    def __init__(
        self,
        name: str,
        *,
        versions: Receiver[int],
        schedule: Schedule,
        push: Callable[[], Awaitable[None]],
        worker: Caller,
    ) -> None:
        super().__init__(name)
        self._versions = versions
        self._schedule = schedule
        self._push = push
        self._worker = worker

    async def run(self) -> None:
        async for version in self._versions:
            # A restarted sampler may have loaded this version already.
            if self._schedule.live < version:
                await self._push_or_wait(version)

    async def _push_or_wait(self, version: int) -> None:
        try:
            await self._push()
        except GeneratorDied as error:
            # Its sampler starts it again, with the learner's present weights, or gives up and ends the run.
            log.warning("weights.push_failed", version=version, error=str(error))
            await self._schedule.wait_live(version)

    async def stop(self) -> None:
        await self._worker.close()
