"""Which waiting requests go through the model together, and who gets which answer. Computes no scores, speaks no HTTP.

``next_batch`` is the policy, a plain function. ``Batcher`` is the queue around it: one worker thread that owns the back
end, bounded waiting, and answers that are given again when the same request comes twice.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import msgspec
import numpy as np
import structlog

from engine.clock import Clock, SystemClock
from engine.errors import TeacherOverloaded, TeacherUnavailable
from engine.training.packing import PrefixCounter, Tokens
from teacher.protocol import ScoreRequest, Scores, TeacherInfo, check_fits

log = structlog.get_logger()

_MOST_LINGERS = 10


class Backend(Protocol):
    """Whatever scores. ``load`` and ``score`` are called from one thread."""

    @property
    def info(self) -> TeacherInfo:
        """Known after ``load``."""
        ...

    def load(self) -> None: ...

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        """Answers, in the order of the requests."""
        ...


class BatcherStatistics(msgspec.Struct, frozen=True, kw_only=True):
    waiting: int
    """Requests in the queue."""
    computing: int
    """Requests in the batch under way."""
    remembered: int
    """Answers kept to be given again."""
    batches_total: int
    requests_total: int
    """Requests answered by the model."""
    repeated_total: int
    """Requests that joined one under way or were given a remembered answer."""
    overloaded_total: int
    withdrawn_total: int
    """Requests whose callers all went away before the model was asked."""
    sequence_tokens_total: int
    """Prompt and response tokens of the requests answered."""
    packed_tokens_total: int
    """The same with common prefixes of a batch counted once."""
    busy_s: float
    """Seconds in which a batch was under way."""


def next_batch(waiting: Sequence[ScoreRequest], *, max_tokens: int) -> list[int]:
    """Choose the requests of the next batch, at least one when any is waiting.

    The oldest always goes first, so a request waits at most for those that came before it. Then come the ones that
    share the oldest's prompt, then the next oldest with the ones that share its prompt, and so on, each if it still
    fits; what does not fit is skipped. A request that is to be computed alone is a batch of its own, when it is the
    oldest.

    Args:
        waiting: oldest first.
        max_tokens: token positions computed, common prefixes counted once. The oldest goes even when it alone is over.

    Returns:
        Indices into ``waiting``, in the order in which they were chosen.
    """
    if not waiting:
        return []
    if waiting[0].alone:
        return [0]
    by_prompt: dict[bytes, list[int]] = {}
    for i, request in enumerate(waiting):
        if not request.alone:
            by_prompt.setdefault(request.prompt_ids.tobytes(), []).append(i)
    chosen: list[int] = []
    counter = PrefixCounter()
    for group in by_prompt.values():
        for i in group:
            tokens = _computed_tokens(waiting[i])
            if not chosen or counter.num_tokens + counter.cost_of(tokens) <= max_tokens:
                counter.add(tokens)
                chosen.append(i)
        if counter.num_tokens >= max_tokens:
            break
    return chosen


class Batcher:
    """The queue in front of one back end.

    Consumes: requests, through ``score``
        waits for:     the first request of a batch, then ``linger_s`` for its company
        unblocked by:  ``score``, ``drain`` or ``stop``
    Produces: answers, to the callers of ``score``

    Args:
        max_batch_tokens: token positions of one forward pass, common prefixes counted once; what is longer goes alone.
        max_queue: requests that may wait; the next one is refused with ``TeacherOverloaded``.
        linger_s: how long the first request of an idle teacher waits for others to share the forward pass; once more
            for as long as others keep coming, ``_MOST_LINGERS`` times at most.
        max_remembered_bytes: of answers kept to be given again, oldest dropped first.
        remember_s: how long an answer is kept.
    """

    def __init__(
        self,
        *,
        backend: Backend,
        max_batch_tokens: int,
        max_queue: int,
        linger_s: float = 0.002,
        max_remembered_bytes: int = 64 << 20,
        remember_s: float = 120.0,
        clock: Clock | None = None,
    ) -> None:
        self._backend = backend
        self._max_batch_tokens = max_batch_tokens
        self._max_queue = max_queue
        self._linger_s = linger_s
        self._clock = clock if clock is not None else SystemClock()
        self._memory = _Memory(max_bytes=max_remembered_bytes, keep_s=remember_s)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher")
        self._waiting: list[_Entry] = []
        self._computing: list[_Entry] = []
        self._by_identity: dict[str, _Entry] = {}
        self._wake = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None
        self._is_draining = False
        self._batch_s = 0.0
        self._batches = self._requests = self._repeated = self._overloaded = self._withdrawn = 0
        self._sequence_tokens = self._packed_tokens = 0
        self._busy_s = 0.0

    @property
    def is_started(self) -> bool:
        """Whether the model is loaded, so that ``info`` is known."""
        return self._loop_task is not None

    @property
    def is_ready(self) -> bool:
        """Whether a request would be taken now, if there is room."""
        return self.is_started and not self._is_draining

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    @property
    def info(self) -> TeacherInfo:
        """Known after ``start``."""
        return self._backend.info

    def statistics(self) -> BatcherStatistics:
        return BatcherStatistics(
            waiting=len(self._waiting),
            computing=len(self._computing),
            remembered=len(self._memory),
            batches_total=self._batches,
            requests_total=self._requests,
            repeated_total=self._repeated,
            overloaded_total=self._overloaded,
            withdrawn_total=self._withdrawn,
            sequence_tokens_total=self._sequence_tokens,
            packed_tokens_total=self._packed_tokens,
            busy_s=self._busy_s,
        )

    async def start(self) -> None:
        """Load the back end in the worker thread, then take requests.

        Raises:
            ModelError: from the back end.
        """
        await asyncio.get_running_loop().run_in_executor(self._thread, self._backend.load)
        self._loop_task = asyncio.create_task(self._run(), name="teacher batches")

    async def score(self, request: ScoreRequest) -> Scores:
        """Wait for the answer. A cancelled call leaves the queue, unless another one asks the same.

        Raises:
            TeacherRefused: (422) it does not fit the model.
            TeacherOverloaded: ``max_queue`` requests are waiting already.
            TeacherUnavailable: not started, draining, or the model failed on the batch that it was part of.
        """
        if not self.is_ready:
            raise TeacherUnavailable("the teacher is shutting down" if self._is_draining else "the teacher is loading")
        identity = request.identity()
        if identity is not None and (remembered := self._memory.get(identity, self._clock.now())) is not None:
            self._repeated += 1
            return remembered
        if identity is not None and identity in self._by_identity:
            self._repeated += 1
            entry = self._by_identity[identity]
        else:
            entry = self._admit(request, identity)
        entry.num_callers += 1
        try:
            # Shielded: the answer belongs to everyone who asked.
            return await asyncio.shield(entry.answer)
        finally:
            entry.num_callers -= 1
            if entry.num_callers == 0 and entry in self._waiting:
                self._waiting.remove(entry)
                self._forget(entry)
                self._withdrawn += 1

    async def drain(self) -> None:
        """Refuse new requests, answer those that wait; returns when none is left. Idempotent."""
        self._is_draining = True
        self._wake.set()
        if self._loop_task is not None:
            # Shielded: whoever gives up waiting has not ended the work.
            await asyncio.shield(self._loop_task)

    async def stop(self) -> None:
        """Give up what waits (``TeacherUnavailable``), finish the batch under way, end the thread. Idempotent."""
        self._is_draining = True
        entries, self._waiting = self._waiting, []
        self._fail(entries, TeacherUnavailable("the teacher was stopped"))
        await self.drain()
        self._thread.shutdown(wait=False)

    def _admit(self, request: ScoreRequest, identity: str | None) -> _Entry:
        check_fits(request, self._backend.info)
        if len(self._waiting) >= self._max_queue:
            self._overloaded += 1
            raise TeacherOverloaded(
                f"{len(self._waiting)} requests are waiting, which is the limit; come back later",
                retry_after_s=self._retry_after_s(),
            )
        entry = _Entry(request, identity)
        self._waiting.append(entry)
        if identity is not None:
            self._by_identity[identity] = entry
        self._wake.set()
        return entry

    def _retry_after_s(self) -> float:
        """About as long as the batch under way and one more take."""
        return min(30.0, max(0.1, 2.0 * self._batch_s))

    async def _run(self) -> None:
        while True:
            if not self._waiting:
                if self._is_draining:
                    return
                self._wake.clear()
                await self._wake.wait()
                if not self._waiting or self._is_draining:
                    continue
                await self._linger()
            chosen = next_batch([entry.request for entry in self._waiting], max_tokens=self._max_batch_tokens)
            batch = [self._waiting[i] for i in chosen]
            taken = set(chosen)
            self._waiting = [entry for i, entry in enumerate(self._waiting) if i not in taken]
            if batch:
                await self._compute(batch)

    async def _linger(self) -> None:
        for _ in range(_MOST_LINGERS if self._linger_s > 0 else 0):
            num_waiting = len(self._waiting)
            if num_waiting == 0 or self._waiting[0].request.alone:
                return
            await self._clock.sleep(self._linger_s)
            if len(self._waiting) <= num_waiting:
                return

    async def _compute(self, batch: list[_Entry]) -> None:
        self._computing = batch
        began_s = self._clock.now()
        requests = [entry.request for entry in batch]
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._backend.score, requests)
        # Whatever the model's library raises, the requests of this batch fail and the next batch is tried.
        except Exception as error:
            log.exception("batch.failed", num_requests=len(batch))
            self._fail(batch, TeacherUnavailable(f"the model failed on this batch: {type(error).__name__}: {error}"))
        else:
            for entry, answer in zip(batch, answers, strict=True):
                self._forget(entry)
                if entry.identity is not None:
                    self._memory.put(entry.identity, answer, self._clock.now())
                if not entry.answer.done():
                    entry.answer.set_result(answer)
            self._requests += len(batch)
        finally:
            self._computing = []
        self._count(requests, self._clock.now() - began_s)

    def _count(self, requests: Sequence[ScoreRequest], seconds: float) -> None:
        counter = PrefixCounter()
        for request in requests:
            counter.add(_computed_tokens(request))
        self._batches += 1
        self._busy_s += seconds
        self._batch_s = seconds if self._batch_s == 0.0 else 0.7 * self._batch_s + 0.3 * seconds
        self._packed_tokens += counter.num_tokens
        self._sequence_tokens += sum(request.num_tokens for request in requests)
        log.debug("batch.scored", num_requests=len(requests), num_tokens=counter.num_tokens, dur_us=int(seconds * 1e6))

    def _fail(self, entries: Sequence[_Entry], error: TeacherUnavailable) -> None:
        for entry in entries:
            self._forget(entry)
            if not entry.answer.done():
                entry.answer.set_exception(error)
                # All callers may be gone; the failure has been logged, so nobody needs to be told again.
                entry.answer.exception()

    def _forget(self, entry: _Entry) -> None:
        if entry.identity is not None:
            del self._by_identity[entry.identity]


class _Entry:
    """A request that is under way, and those who wait for it."""

    __slots__ = ("answer", "identity", "num_callers", "request")

    def __init__(self, request: ScoreRequest, identity: str | None) -> None:
        self.request = request
        self.identity = identity
        self.answer: asyncio.Future[Scores] = asyncio.get_running_loop().create_future()
        self.num_callers = 0


class _Memory:
    """Recent answers under the identity of their requests, bounded in bytes and age."""

    def __init__(self, *, max_bytes: int, keep_s: float) -> None:
        self._max_bytes = max_bytes
        self._keep_s = keep_s
        self._num_bytes = 0
        self._answers: OrderedDict[str, tuple[float, Scores]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, identity: str, now_s: float) -> Scores | None:
        self._drop_old(now_s)
        found = self._answers.get(identity)
        return None if found is None else found[1]

    def put(self, identity: str, scores: Scores, now_s: float) -> None:
        self._answers[identity] = (now_s, scores)
        self._num_bytes += _num_bytes(scores)
        self._drop_old(now_s)

    def _drop_old(self, now_s: float) -> None:
        while self._answers:
            made_s, scores = next(iter(self._answers.values()))
            if self._num_bytes <= self._max_bytes and now_s - made_s <= self._keep_s:
                return
            self._answers.popitem(last=False)
            self._num_bytes -= _num_bytes(scores)


def _computed_tokens(request: ScoreRequest) -> Tokens:
    # The last response token is scored, never read.
    return np.concatenate((request.prompt_ids, request.response_ids[:-1]))


def _num_bytes(scores: Scores) -> int:
    arrays = (scores.top_ids, scores.top_logprobs, scores.sampled_logprobs, scores.extra_logprobs)
    return sum(array.nbytes for array in arrays if array is not None)
