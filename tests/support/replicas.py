"""Replicas of a teacher without a model: what they answer, when, and how they fail is the test's decision."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from engine.errors import TeacherUnavailable
from teacher.protocol import PROTOCOL, Scores, TeacherInfo

INFO = TeacherInfo(
    model="tiny",
    vocab_size=384,
    tokenizer_size=384,
    tokenizer_fingerprint="0123abcd",
    max_length=512,
    max_top_k=64,
    protocol=PROTOCOL,
    weights_fingerprint="aaaa",
)

OTHER_MODEL = msgspec.structs.replace(INFO, weights_fingerprint="bbbb")
"""In a folder of the same name."""

Held = Literal["held"]
Outcome = Exception | Held | None
"""What a score meets: an error, a wait for the test, or (None) an answer at once."""


def scores_for(response_ids: Sequence[int], top_k: int) -> Scores:
    """An answer that shows which question it answers: token i has log-probability −i."""
    shape = (len(response_ids), top_k)
    return Scores(
        top_ids=np.zeros(shape, np.int32),
        top_logprobs=np.zeros(shape, np.float32),
        sampled_logprobs=-np.asarray(response_ids, np.float32),
    )


class Call:
    """One score that reached a replica."""

    def __init__(self, request_id: str, response_ids: Sequence[int], top_k: int) -> None:
        self.request_id = request_id
        self.response_ids = tuple(response_ids)
        self.top_k = top_k
        self.is_cancelled = False
        self.end: asyncio.Future[Scores] = asyncio.get_running_loop().create_future()

    @property
    def is_open(self) -> bool:
        return not self.end.done() and not self.is_cancelled

    def answer(self) -> None:
        self.end.set_result(scores_for(self.response_ids, self.top_k))

    def fail(self, error: Exception) -> None:
        self.end.set_exception(error)


class FakeReplica:
    """Keeps the contract of ``TeacherClient``: errors of the two kinds, cancellation frees the request, ``ready`` never
    raises, ``close`` ends what is open.

    Args:
        default: what scores meet once ``script`` is used up.
    """

    def __init__(self, *, info: TeacherInfo = INFO, default: Outcome = None) -> None:
        self._info = info
        self.default = default
        self.script: deque[Outcome] = deque()
        self.calls: list[Call] = []
        self.peak_in_flight = 0
        self.num_probes = 0
        self.is_up = True
        self.is_closed = False
        self.info_error: Exception | None = None

    @property
    def open_calls(self) -> list[Call]:
        return [call for call in self.calls if call.is_open]

    def die(self) -> None:
        """As by SIGKILL: what is open breaks, nothing answers any more."""
        self.is_up = False
        for call in self.open_calls:
            call.fail(TeacherUnavailable("connection reset"))

    def revive(self, info: TeacherInfo = INFO) -> None:
        self.is_up = True
        self._info = info

    async def info(self) -> TeacherInfo:
        if not self.is_up:
            raise TeacherUnavailable("connection refused")
        if self.info_error is not None:
            raise self.info_error
        return self._info

    async def ready(self) -> bool:
        self.num_probes += 1
        return self.is_up

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
        if not self.is_up:
            raise TeacherUnavailable("connection refused")
        assert request_id is not None, "the pool gives every request an id"
        call = Call(request_id, response_ids, top_k)
        self.calls.append(call)
        self.peak_in_flight = max(self.peak_in_flight, len(self.open_calls))
        outcome = self.script.popleft() if self.script else self.default
        if isinstance(outcome, Exception):
            call.fail(outcome)
        elif outcome is None:
            call.answer()
        try:
            return await call.end
        except asyncio.CancelledError:
            call.is_cancelled = True
            raise

    async def close(self) -> None:
        self.is_closed = True
        self.die()
