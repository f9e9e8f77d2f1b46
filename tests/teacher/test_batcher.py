"""Who is scored together, who waits, and what happens to those who go away, come twice or come too many."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ModelError, TeacherOverloaded, TeacherRefused, TeacherUnavailable
from engine.training.packing import pack
from teacher.batcher import Batcher, next_batch
from teacher.protocol import ScoreRequest, Scores, TeacherInfo, score_request
from tests.support.clock import ManualClock, Settle

INFO = TeacherInfo(
    model="fake",
    vocab_size=1000,
    tokenizer_size=1000,
    tokenizer_fingerprint="",
    max_length=100,
    max_top_k=10,
    protocol=1,
)


def make_request(
    *, prompt: Sequence[int] = (1,), response: Sequence[int] = (2,), alone: bool = False, request_id: str | None = None
) -> ScoreRequest:
    return score_request(
        prompt_ids=list(prompt), response_ids=list(response), top_k=1, alone=alone, request_id=request_id
    )


class HeldBackend:
    """Answers a batch when told to; sampled_logprobs holds minus the number of the batch."""

    def __init__(self) -> None:
        self.info = INFO
        self.batches: list[list[int]] = []
        """First response token of each request."""
        self.failure: Exception | None = None
        self._may_answer = threading.Semaphore(0)

    def load(self) -> None:
        if self.failure is not None:
            raise self.failure

    def let_answer(self, num_batches: int = 1) -> None:
        self._may_answer.release(num_batches)

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        self.batches.append([int(request.response_ids[0]) for request in requests])
        number = len(self.batches)
        self._may_answer.acquire()
        if self.failure is not None:
            raise self.failure
        return [
            Scores(
                top_ids=np.zeros((len(request.response_ids), 1), np.int32),
                top_logprobs=np.zeros((len(request.response_ids), 1), np.float32),
                sampled_logprobs=np.full(len(request.response_ids), -number, np.float32),
            )
            for request in requests
        ]


async def started(
    backend: HeldBackend,
    *,
    max_batch_tokens: int = 1000,
    max_queue: int = 100,
    linger_s: float = 0.0,
    clock: ManualClock | None = None,
    max_remembered_bytes: int = 1 << 20,
) -> Batcher:
    batcher = Batcher(
        backend=backend,
        max_batch_tokens=max_batch_tokens,
        max_queue=max_queue,
        linger_s=linger_s,
        clock=clock if clock is not None else ManualClock(),
        max_remembered_bytes=max_remembered_bytes,
        remember_s=10.0,
    )
    await batcher.start()
    return batcher


async def until_computing(batcher: Batcher, settle: Settle) -> None:
    await settle()
    assert batcher.statistics().computing > 0


def ask(batcher: Batcher, request: ScoreRequest) -> asyncio.Task[Scores]:
    return asyncio.create_task(batcher.score(request))


# The policy


def test_samples_of_the_oldest_prompt_come_before_an_older_stranger() -> None:
    waiting = [
        make_request(prompt=[1, 1, 1], response=[5, 5]),
        make_request(prompt=[2, 2, 2], response=[6, 6]),
        make_request(prompt=[1, 1, 1], response=[7, 7]),
    ]

    assert next_batch(waiting, max_tokens=8) == [0, 2]
    assert next_batch(waiting, max_tokens=9) == [0, 2, 1]


def test_what_does_not_fit_is_skipped_and_smaller_ones_fill_the_room() -> None:
    waiting = [make_request(prompt=[n], response=[9] * size) for n, size in ((1, 3), (2, 9), (3, 2))]

    assert next_batch(waiting, max_tokens=6) == [0, 2]


def test_the_oldest_goes_even_when_it_is_over_the_budget() -> None:
    assert next_batch([make_request(prompt=[1] * 50), make_request()], max_tokens=10) == [0]


def test_a_request_that_wants_to_be_alone_is_a_batch_of_its_own_when_it_is_its_turn() -> None:
    waiting = [make_request(), make_request(alone=True), make_request(response=[3])]

    assert next_batch(waiting, max_tokens=100) == [0, 2]
    assert next_batch(waiting[1:], max_tokens=100) == [0]


def test_nobody_waiting_makes_no_batch() -> None:
    assert next_batch([], max_tokens=10) == []


requests = st.builds(
    make_request,
    prompt=st.lists(st.integers(1, 2), min_size=1, max_size=4),
    response=st.lists(st.integers(1, 2), min_size=1, max_size=4),
    alone=st.integers(0, 4).map(lambda n: n == 0),
)


@given(st.lists(requests, min_size=1, max_size=12), st.integers(1, 20))
def test_a_batch_keeps_the_budget_and_begins_with_the_oldest(waiting: list[ScoreRequest], max_tokens: int) -> None:
    chosen = next_batch(waiting, max_tokens=max_tokens)

    assert chosen[0] == 0
    assert len(set(chosen)) == len(chosen)
    if len(chosen) > 1:
        assert not any(waiting[i].alone for i in chosen)
        sequences = [np.concatenate((waiting[i].prompt_ids, waiting[i].response_ids[:-1])) for i in chosen]
        assert pack(sequences).num_tokens <= max_tokens


@given(st.lists(requests, max_size=12), st.integers(1, 20))
def test_every_request_is_in_a_batch_after_at_most_as_many_batches_as_stand_before_it(
    waiting: list[ScoreRequest], max_tokens: int
) -> None:
    left = list(enumerate(waiting))
    batch = 0
    while left:
        chosen = next_batch([request for _, request in left], max_tokens=max_tokens)
        assert all(left[i][0] >= batch for i in chosen)
        left = [item for i, item in enumerate(left) if i not in set(chosen)]
        batch += 1
    assert batch <= len(waiting)


# The queue


async def test_requests_that_arrive_during_a_batch_are_the_next_one(settle: Settle) -> None:
    backend = HeldBackend()
    batcher = await started(backend)
    first = ask(batcher, make_request(response=[1]))
    await until_computing(batcher, settle)
    later = [ask(batcher, make_request(response=[n])) for n in (2, 3)]
    await settle()
    backend.let_answer(2)

    answers = await asyncio.gather(first, *later)

    assert backend.batches == [[1], [2, 3]]
    assert [float(answer.sampled_logprobs[0]) for answer in answers] == [-1, -2, -2]
    assert batcher.statistics().packed_tokens_total == 2
    assert batcher.statistics().sequence_tokens_total == 6
    await batcher.stop()


async def test_an_idle_teacher_waits_for_company_as_long_as_it_comes(settle: Settle, clock: ManualClock) -> None:
    backend = HeldBackend()
    batcher = await started(backend, linger_s=0.002, clock=clock)
    backend.let_answer()
    tasks = []
    for n in (1, 2, 3):
        tasks.append(ask(batcher, make_request(response=[n])))
        await clock.advance(0.0015)
        assert batcher.statistics().waiting == n
    await clock.advance(0.003)

    await asyncio.gather(*tasks)

    assert backend.batches == [[1, 2, 3]]
    await batcher.stop()


async def test_a_full_queue_refuses_and_says_when_to_come_back(settle: Settle) -> None:
    backend = HeldBackend()
    batcher = await started(backend, max_queue=2)
    tasks = [ask(batcher, make_request(response=[1]))]
    await until_computing(batcher, settle)
    tasks += [ask(batcher, make_request(response=[n])) for n in (2, 3)]
    await settle()

    with pytest.raises(TeacherOverloaded, match="2 requests are waiting, which is the limit") as caught:
        await batcher.score(make_request(response=[4]))
    assert 0 < caught.value.retry_after_s <= 30
    assert batcher.statistics().overloaded_total == 1

    backend.let_answer(2)
    await asyncio.gather(*tasks)
    await batcher.stop()


async def test_a_caller_that_goes_away_leaves_the_queue(settle: Settle) -> None:
    backend = HeldBackend()
    batcher = await started(backend)
    first = ask(batcher, make_request(response=[1]))
    await until_computing(batcher, settle)
    gone, stays = (ask(batcher, make_request(response=[n])) for n in (2, 3))
    await settle()
    gone.cancel()
    await settle()
    backend.let_answer(2)
    await asyncio.gather(first, stays)

    assert backend.batches == [[1], [3]]
    assert batcher.statistics().withdrawn_total == 1
    await batcher.stop()


async def test_a_repeated_id_joins_the_request_under_way_and_is_given_its_answer_later(
    settle: Settle, clock: ManualClock
) -> None:
    backend = HeldBackend()
    batcher = await started(backend, clock=clock)
    first = ask(batcher, make_request(request_id="a"))
    await until_computing(batcher, settle)
    second = ask(batcher, make_request(request_id="a"))
    await settle()
    backend.let_answer()

    one, two = await asyncio.gather(first, second)
    three = await batcher.score(make_request(request_id="a"))

    assert backend.batches == [[2]]
    assert one is two is three
    assert batcher.statistics().repeated_total == 2

    await clock.advance(11.0)  # past remember_s
    backend.let_answer()
    assert await batcher.score(make_request(request_id="a")) is not one
    assert batcher.statistics().remembered == 1
    await batcher.stop()


async def test_a_repeated_request_survives_the_first_caller(settle: Settle) -> None:
    backend = HeldBackend()
    batcher = await started(backend)
    blocker = ask(batcher, make_request(response=[1]))
    await until_computing(batcher, settle)
    first, second = (ask(batcher, make_request(request_id="a")) for _ in range(2))
    await settle()
    first.cancel()
    await settle()
    backend.let_answer(2)

    await asyncio.gather(blocker, second)

    assert backend.batches == [[1], [2]]
    await batcher.stop()


async def test_an_id_with_another_content_is_another_request() -> None:
    backend = HeldBackend()
    batcher = await started(backend)
    backend.let_answer(3)

    answers = [
        await batcher.score(request)
        for request in (
            make_request(request_id="a"),
            make_request(request_id="a", response=[3]),
            make_request(request_id="a", alone=True),
        )
    ]

    assert [float(answer.sampled_logprobs[0]) for answer in answers] == [-1, -2, -3]
    await batcher.stop()


async def test_remembered_answers_are_bounded_in_bytes() -> None:
    backend = HeldBackend()
    batcher = await started(backend, max_remembered_bytes=30)  # an answer to one token has 12
    backend.let_answer(4)

    for name in "abcd":
        await batcher.score(make_request(request_id=name))

    assert batcher.statistics().remembered == 2
    await batcher.stop()


async def test_a_batch_that_fails_fails_its_requests_and_not_the_next_ones(settle: Settle) -> None:
    backend = HeldBackend()
    batcher = await started(backend)
    backend.failure = RuntimeError("out of memory")
    backend.let_answer()
    with pytest.raises(TeacherUnavailable, match="the model failed on this batch: RuntimeError: out of memory"):
        await batcher.score(make_request(request_id="a"))

    backend.failure = None
    backend.let_answer()
    await batcher.score(make_request(request_id="a"))

    assert backend.batches == [[2], [2]]
    await batcher.stop()


async def test_draining_answers_what_waits_and_refuses_what_is_new(settle: Settle) -> None:
    backend = HeldBackend()
    batcher = await started(backend)
    tasks = [ask(batcher, make_request(response=[1]))]
    await until_computing(batcher, settle)
    tasks.append(ask(batcher, make_request(response=[2])))
    await settle()
    drained = asyncio.create_task(batcher.drain())
    await settle()

    with pytest.raises(TeacherUnavailable, match="the teacher is shutting down"):
        await batcher.score(make_request(response=[3]))
    assert (batcher.is_ready, drained.done()) == (False, False)

    backend.let_answer(2)
    await drained
    assert [task.done() for task in tasks] == [True, True]
    assert backend.batches == [[1], [2]]
    await batcher.stop()


async def test_stopping_gives_up_what_waits_and_finishes_the_batch_under_way(settle: Settle) -> None:
    backend = HeldBackend()
    batcher = await started(backend)
    computed = ask(batcher, make_request(response=[1]))
    await until_computing(batcher, settle)
    waiting = ask(batcher, make_request(response=[2]))
    await settle()
    backend.let_answer()

    await asyncio.gather(batcher.stop(), batcher.stop())

    await computed
    with pytest.raises(TeacherUnavailable, match="was stopped"):
        await waiting


async def test_a_model_that_does_not_load_is_reported_to_whoever_starts() -> None:
    backend = HeldBackend()
    backend.failure = ModelError("no such folder")

    with pytest.raises(ModelError, match="no such folder"):
        await started(backend)


async def test_before_the_start_nothing_is_taken() -> None:
    batcher = Batcher(backend=HeldBackend(), max_batch_tokens=10, max_queue=1)

    with pytest.raises(TeacherUnavailable, match="the teacher is loading"):
        await batcher.score(make_request())
    await batcher.stop()


async def test_what_the_model_can_never_answer_is_refused_before_it_waits() -> None:
    batcher = await started(HeldBackend())

    with pytest.raises(TeacherRefused, match="vocabulary ends at 999"):
        await batcher.score(make_request(response=[1000]))
    await batcher.stop()
