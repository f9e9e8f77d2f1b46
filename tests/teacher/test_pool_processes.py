"""The pool over real services that are killed with SIGKILL in the middle of their work."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from engine.recipe import HttpTeacher
from teacher.backend_torch import TorchBackend
from teacher.batcher import Batcher
from teacher.fingerprint import weights_fingerprint
from teacher.pool import ReplicaPool, connect
from teacher.protocol import Scores
from teacher.server import TeacherServer
from tests.support.models import tiny_model
from tests.teacher.conftest import Service

NUM_SCORES = 50
Lines = list[Any]


@asynccontextmanager
async def pool_at(*urls: str) -> AsyncIterator[ReplicaPool]:
    pool = connect(
        HttpTeacher(
            urls=urls,
            values="float32",
            max_in_flight=4,
            deadline_s=20.0,
            backoff_s=0.05,
            max_backoff_s=0.2,
            breaker_failures=2,
            probe_every_s=0.1,
        )
    )
    try:
        yield pool
    finally:
        await pool.close()


class Scoring:
    """``NUM_SCORES`` scores, asked for at once, each of an answer of its own."""

    def __init__(self, pool: ReplicaPool) -> None:
        self._pool = pool
        self._some_answered = asyncio.Event()
        self._num_answered = 0
        self._tasks = [asyncio.create_task(self._score(number)) for number in range(NUM_SCORES)]

    async def some_answered(self) -> None:
        """Until ten are answered, and most are not."""
        await self._some_answered.wait()
        assert self._num_answered < NUM_SCORES - 10

    async def check_all_answered(self) -> None:
        """Every score is the one that the same question gets now."""
        async with asyncio.timeout(60):
            scores = await asyncio.gather(*self._tasks)
        again = await asyncio.gather(*(self._ask(number) for number in range(NUM_SCORES)))
        for score, expected in zip(scores, again, strict=True):
            np.testing.assert_allclose(score.sampled_logprobs, expected.sampled_logprobs, atol=1e-4)
        assert len({score.sampled_logprobs.tobytes() for score in scores}) == NUM_SCORES

    async def _score(self, number: int) -> Scores:
        scores = await self._ask(number)
        self._num_answered += 1
        if self._num_answered == 10:
            self._some_answered.set()
        return scores

    async def _ask(self, number: int) -> Scores:
        return await self._pool.score(prompt_ids=[1, 50, 60, 70], response_ids=[100 + number] * 40, top_k=8)


@asynccontextmanager
async def serving(model: Path, *, port: int = 0) -> AsyncIterator[str]:
    """The service at a URL, in this process: to the pool it is the same HTTP, and it is there in a moment."""
    batcher = Batcher(backend=TorchBackend(model=str(model), num_threads=1), max_batch_tokens=2048, max_queue=256)
    server = TeacherServer(batcher=batcher, token=None, max_request_bytes=1 << 20, max_queue=256)
    port = await server.start(host="127.0.0.1", port=port)
    await batcher.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await server.stop()
        await batcher.stop()


@pytest.fixture
def lines() -> Iterator[Lines]:
    with capture_logs() as captured:
        yield captured


def named(lines: Lines, event: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"] == event]


async def until_named(lines: Lines, event: str) -> None:
    """Until another process has caused ``event``: a real wait, there is nothing else to wait for."""
    async with asyncio.timeout(60):
        while not named(lines, event):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_no_score_is_lost_when_one_of_two_services_is_killed(
    start_service: Callable[..., Service], teacher_folder: Path, lines: Lines
) -> None:
    killed = start_service()
    async with serving(teacher_folder) as left_url, pool_at(killed.url, left_url) as pool:
        # Until both have loaded.
        async with asyncio.timeout(60):
            while {replica.state for replica in pool.statistics().replicas} != {"closed"}:
                await pool.score(prompt_ids=[1], response_ids=[2], top_k=1)
                await asyncio.sleep(0.02)
        lines.clear()  # of a pool that waited for services to load
        scoring = Scoring(pool)
        await scoring.some_answered()

        killed.end(signal.SIGKILL)

        await scoring.check_all_answered()
        states = {replica.name: replica.state for replica in pool.statistics().replicas}
        assert states == {killed.url: "open", left_url: "closed"}
        assert pool.statistics().retries_total > 0
        assert not named(lines, "teacher.parked")


async def test_scores_wait_for_the_killed_service_and_for_no_other_model(
    start_service: Callable[..., Service], teacher_folder: Path, tmp_path: Path, lines: Lines
) -> None:
    service = start_service()
    port = int(service.url.rpartition(":")[2])
    async with pool_at(service.url) as pool:
        await asyncio.wait_for(pool.score(prompt_ids=[1], response_ids=[2], top_k=1), 60)
        lines.clear()
        scoring = Scoring(pool)
        await scoring.some_answered()

        service.end(signal.SIGKILL)
        await until_named(lines, "teacher.parked")
        async with serving(tiny_model(tmp_path / teacher_folder.name, seed=2), port=port):
            await until_named(lines, "teacher.replica_rejected")
            assert pool.statistics().num_parked > NUM_SCORES - 20
        async with serving(teacher_folder, port=port):
            await scoring.check_all_answered()

        (parked,) = named(lines, "teacher.parked")
        (resumed,) = named(lines, "teacher.resumed")
        assert parked["num_parked"] > NUM_SCORES - 20
        assert resumed["parked_s"] > 0
        (rejected,) = named(lines, "teacher.replica_rejected")
        ours, theirs = weights_fingerprint(teacher_folder), weights_fingerprint(tmp_path / teacher_folder.name)
        assert rejected["reason"] == f"weights_fingerprint is {theirs!r}, the other replicas have {ours!r}"
        assert pool.statistics().num_open == 0
