"""A teacher that knows nothing and takes the time that scoring would take: the simulation's ``Teacher``.

Any number of replicas work through one queue, first come, first served: a replica that is free takes the next batch.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.clock import Clock
from engine.costs import teacher_batch_s
from engine.errors import TeacherUnavailable
from engine.recipe import ReplayConfig
from teacher.protocol import PROTOCOL, Scores, TeacherInfo

_GATHER_S = 1e-6
"""Rollouts that end in one decode step come one after the other at one instant of virtual time. A teacher that scores
several together begins when all of them are there, as a batcher in a thread of its own does."""


class ReplayTeacher:
    """Satisfies ``teacher.protocol.Teacher`` on virtual time.

    Args:
        costs: seconds; rollouts per batch, batches side by side.
        num_replicas: in all.
    """

    def __init__(self, *, costs: ReplayConfig, num_replicas: int, clock: Clock) -> None:
        self._costs = costs
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._num_idle = num_replicas * costs.teacher_parallel
        self._waiting: deque[tuple[int, bool, asyncio.Future[None]]] = deque()
        self._is_gathering = False
        self._is_closed = False
        self._num_open = 0
        self._open_since = 0.0
        self._busy_s = 0.0
        self._ids: npt.NDArray[np.int32] = np.zeros((0, 0), np.int32)
        self._logprobs: npt.NDArray[np.float32] = np.zeros((0, 0), np.float32)

    def busy_s(self) -> float:
        """Seconds in which at least one rollout was at the teacher."""
        return self._busy_s + (self._clock.now() - self._open_since if self._num_open else 0.0)

    async def info(self) -> TeacherInfo:
        return TeacherInfo(
            model="replay",
            vocab_size=2**31 - 1,
            tokenizer_size=2**31 - 1,
            tokenizer_fingerprint="",
            max_length=2**31 - 1,
            max_top_k=2**31 - 1,
            protocol=PROTOCOL,
        )

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
        """As ``Teacher.score``; every probability is 1.

        Raises:
            TeacherUnavailable: closed.
        """
        if self._is_closed:
            raise TeacherUnavailable("the teacher is shutting down")
        answer: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append((len(prompt_ids) + len(response_ids), alone, answer))
        if self._num_open == 0:
            self._open_since = self._clock.now()
        self._num_open += 1
        try:
            self._begin_soon()
            await answer
        finally:
            self._num_open -= 1
            if self._num_open == 0:
                self._busy_s += self._clock.now() - self._open_since
        return self._scores(len(response_ids), top_k, extra_ids)

    async def close(self) -> None:
        self._is_closed = True
        while self._waiting:
            _, _, answer = self._waiting.popleft()
            if not answer.done():
                answer.set_exception(TeacherUnavailable("the teacher is shutting down"))

    def _begin_soon(self) -> None:
        if self._costs.teacher_batch_rollouts == 1:
            self._begin()
        elif not self._is_gathering:
            self._is_gathering = True
            self._loop.call_later(_GATHER_S, self._begin)

    def _begin(self) -> None:
        """Give the free replicas what waits."""
        self._is_gathering = False
        while self._num_idle and self._waiting:
            batch: list[asyncio.Future[None]] = []
            num_tokens = 0
            limit = self._costs.teacher_batch_rollouts
            while self._waiting and len(batch) < limit:
                length, alone, answer = self._waiting.popleft()
                limit = 1 if alone else limit  # a run is deterministic for all of its rollouts
                if not answer.done():  # not given up
                    batch.append(answer)
                    num_tokens += length
            if batch:
                self._num_idle -= 1
                self._loop.call_later(teacher_batch_s(self._costs, num_tokens), self._end, batch)

    def _end(self, batch: list[asyncio.Future[None]]) -> None:
        self._num_idle += 1
        self._loop.call_later(self._costs.teacher_latency_s, _answer, batch)
        self._begin_soon()

    def _scores(self, num_tokens: int, top_k: int, extra_ids: npt.NDArray[np.int32] | None) -> Scores:
        if num_tokens > len(self._ids) or top_k != self._ids.shape[1]:
            # Views of one array: as large as the real ones for whoever counts bytes, and made in no time.
            self._ids = np.zeros((2 * num_tokens, top_k), np.int32)
            self._logprobs = np.zeros((2 * num_tokens, top_k), np.float32)
        return Scores(
            top_ids=self._ids[:num_tokens],
            top_logprobs=self._logprobs[:num_tokens],
            sampled_logprobs=self._logprobs[:num_tokens, 0],
            extra_logprobs=None if extra_ids is None else np.zeros(extra_ids.shape, np.float32),
        )


def _answer(batch: list[asyncio.Future[None]]) -> None:
    for answer in batch:
        if not answer.done():
            answer.set_result(None)
