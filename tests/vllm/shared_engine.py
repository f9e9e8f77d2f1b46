"""A running engine that is lent to one generator after another, so that tests get fresh ones in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from engine.generation.vllm import VllmGenerator, _Life
from engine.generation.vllm_engine import StepCounts, VllmEngine
from engine.generation.vllm_model import tensor_groups_of
from engine.generation.vllm_transfer import Transfer, make_transfer
from engine.recipe import SamplerConfig, StudentConfig, WeightsConfig
from tests.engine.generation.contract import buckets_of


class SharedEngine:
    """Owns the engine; ``lend`` gives a generator that behaves as if it had just started it."""

    def __init__(
        self, *, config: SamplerConfig, student: StudentConfig, max_length: int, models: Sequence[PreTrainedModel]
    ) -> None:
        self.config = config
        self.student = student
        self.max_length = max_length
        self.models = models
        self.borrower: Borrower | None = None
        self.transfer: Transfer = make_transfer("shm", torch.device("cpu"), bucket_bytes=1 << 20)
        self._engine: VllmEngine | None = None

    async def start(self) -> None:
        self._engine = await VllmEngine.start(
            config=self.config,
            student=self.student,
            max_length=self.max_length,
            version=0,
            on_step=self._on_step,
            transfer_backend=self.transfer.backend,
        )
        await self.transfer.connect(self._engine)

    async def stop(self) -> None:
        await self.engine.stop()

    @property
    def engine(self) -> VllmEngine:
        assert self._engine is not None
        return self._engine

    async def lend(self) -> Borrower:
        """Version 0 is loaded whatever the last borrower left; give it back with ``give_back``."""
        self.borrower = Borrower(self)
        await self.borrower.start()
        await self.borrower.update_weights(0, buckets_of(self.models[0]), config=WeightsConfig())
        self.borrower.forget()
        return self.borrower

    def _on_step(self, counts: StepCounts) -> None:
        if self.borrower is not None:
            self.borrower._on_step(counts)


class Borrower(VllmGenerator):
    """A whole generator but for the start and the end of the engine."""

    def __init__(self, shared: SharedEngine) -> None:
        super().__init__(config=shared.config, student=shared.student, max_length=shared.max_length)
        self._shared = shared

    async def _begin_life(self) -> _Life:
        self._groups = tensor_groups_of(self._student)
        return self._life_of(_Kept(self._shared.engine), self._shared.transfer)

    def forget(self) -> None:
        """What brought version 0 back is not part of this generator's life."""
        assert self._life is not None
        self._life.switches.clear()
        self._counts = type(self._counts)()


class _Kept(VllmEngine):
    """The same engine, whose end is somebody else's business."""

    def __init__(self, engine: VllmEngine) -> None:
        self.__dict__ = engine.__dict__

    async def stop(self) -> None:
        pass
