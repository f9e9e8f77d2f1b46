"""The teacher in this process: the same back end and batches as the service, without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine import recipe
from engine.clock import Clock
from engine.errors import TeacherUnavailable
from teacher.backend_torch import TorchBackend
from teacher.batcher import Batcher, BatcherStatistics
from teacher.protocol import Scores, TeacherInfo, score_request


class LocalTeacher:
    """A ``Teacher`` made from the recipe's section. The model is loaded by the first call, in a thread of its own.

    Values are not packed: float32 as the model gave them, and a whole vocabulary (K = V) in the order of ids.
    """

    def __init__(self, config: recipe.LocalTeacher, *, clock: Clock | None = None) -> None:
        self._batcher = Batcher(
            backend=TorchBackend(
                model=config.model,
                device=config.device,
                dtype=config.dtype,
                num_threads=config.num_threads,
                padded_tokens=config.max_batch_tokens,
                whole_by_id=True,
                trust_remote_code=config.trust_remote_code,
            ),
            max_batch_tokens=config.max_batch_tokens,
            # Callers in the same process are bounded by ``max_in_flight``; refusing them would only cost a retry.
            max_queue=1 << 30,
            clock=clock,
        )
        self._is_closed = False
        self._start: asyncio.Task[None] | None = None

    async def info(self) -> TeacherInfo:
        """What the model is.

        Raises:
            ModelError: folder, weights or tokenizer missing or broken.
        """
        await self._started()
        return self._batcher.info

    def statistics(self) -> BatcherStatistics:
        return self._batcher.statistics()

    async def score(
        self,
        *,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int],
        top_k: int,
        extra_ids: npt.NDArray[np.int32] | None = None,
        alone: bool = False,
        request_id: str | None = None,
    ) -> Scores:
        """Score one response; as ``Teacher.score``.

        Raises:
            ModelError: as ``info``.
            TeacherRefused: the request does not fit the model.
            TeacherUnavailable: closed, or the model failed on this batch.
        """
        request = score_request(
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            top_k=top_k,
            extra_ids=extra_ids,
            alone=alone,
            request_id=request_id,
        )
        await self._started()
        return await self._batcher.score(request)

    async def close(self) -> None:
        """Give up what waits and end the thread. Idempotent."""
        self._is_closed = True
        if self._start is not None:
            # A model that could not be loaded has been reported to whoever asked.
            await asyncio.wait([self._start])
            if not self._start.cancelled():
                self._start.exception()
        await self._batcher.stop()

    async def _started(self) -> None:
        if self._is_closed:
            raise TeacherUnavailable("the teacher is shutting down")
        if self._start is None:
            self._start = asyncio.create_task(self._batcher.start(), name="teacher load")
        await asyncio.shield(self._start)
