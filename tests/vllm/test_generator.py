"""The vLLM generator: the common contract, and what only it promises."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from engine.errors import GeneratorDied
from engine.generation.protocol import Generation, Generator
from engine.recipe import WeightsConfig
from tests.engine.generation.contract import (
    GeneratorContract,
    Subject,
    buckets_of,
    reference_logprobs,
    request,
)
from tests.vllm.shared_engine import Borrower, SharedEngine

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(loop_scope="session")
async def generator(shared: SharedEngine) -> AsyncIterator[Borrower]:
    generator = await shared.lend()
    yield generator
    await generator.stop()


@asynccontextmanager
async def subject_of(shared: SharedEngine) -> AsyncIterator[Subject]:
    lent: list[Borrower] = []

    async def start() -> Generator:
        lent.append(await shared.lend())
        return lent[-1]

    yield Subject(
        start=start,
        num_slots=shared.config.num_slots,
        models=shared.models,
        tolerance=1e-5,
        max_positions=shared.max_length,
    )
    for generator in lent:
        await generator.stop()


class TestVllm(GeneratorContract):
    @pytest_asyncio.fixture(loop_scope="session")
    async def subject(self, shared: SharedEngine) -> AsyncIterator[Subject]:
        async with subject_of(shared) as subject:
            yield subject


class TestVllmMixtureOfExperts(GeneratorContract):
    """Latent attention on CPU runs without a prefix cache and with another block size."""

    @pytest_asyncio.fixture(loop_scope="session")
    async def subject(self, shared_moe: SharedEngine) -> AsyncIterator[Subject]:
        async with subject_of(shared_moe) as subject:
            yield subject


async def test_answers_to_one_prompt_share_what_is_computed_of_it(generator: Borrower) -> None:
    prompt = [3 + i % 90 for i in range(200)]

    await asyncio.gather(*(generator.generate(request(i, prompt=prompt)) for i in range(4)))

    # All whole blocks of 32 but once; the last, open one four times.
    assert generator.statistics().prefill_tokens_total < 2 * len(prompt)


async def test_nothing_is_shared_across_weights_that_kept_their_keys_and_values(
    generator: Borrower, shared: SharedEngine
) -> None:
    prompt = [3 + i % 90 for i in range(100)]
    await generator.generate(request(0, prompt=prompt))
    await generator.update_weights(1, buckets_of(shared.models[1]), config=WeightsConfig(kv_cache="keep"))

    answer = await generator.generate(request(0, prompt=prompt))

    expected = reference_logprobs(shared.models[1], prompt, answer.token_ids)
    assert answer.logprobs == pytest.approx(expected, abs=1e-5)
    assert [(span.version, span.stale_kv) for span in answer.spans] == [(1, False)]


async def test_what_begins_is_told_the_version_of_its_first_token_while_weights_change(
    generator: Borrower, shared: SharedEngine
) -> None:
    begun: dict[int, int] = {}
    is_over = False

    async def ask(first_id: int) -> list[Generation]:
        answers: list[Generation] = []
        while not is_over:
            asked = request(first_id + 100 * len(answers), max_new_tokens=9 + first_id)
            answers.append(
                await generator.generate(asked, on_begin=functools.partial(begun.__setitem__, asked.request_id))
            )
        return answers

    asking = [asyncio.create_task(ask(i)) for i in range(8)]
    for version in range(1, 9):
        await generator.update_weights(version, buckets_of(shared.models[version % 2]), config=WeightsConfig())
    is_over = True
    answers = [answer for task in asking for answer in await task]

    assert {answer.request_id: answer.spans[0].version for answer in answers} == begun
    assert len({span.version for answer in answers for span in answer.spans}) == 9


async def test_two_hundred_updates_leave_no_drift_and_nothing_behind(generator: Borrower, shared: SharedEngine) -> None:
    """With requests under way all the time, and both processes looked at from outside."""
    (engine_pid,) = await shared.engine.call_workers("process_id")
    version_bytes = sum(p.numel() * p.element_size() for p in shared.models[0].parameters())
    is_over = False

    async def ask(request_id: int) -> int:
        count = 0
        while not is_over:
            asked = request(request_id, max_new_tokens=20)
            answer = await generator.generate(asked)
            for span in answer.spans:
                expected = reference_logprobs(shared.models[span.version % 2], asked.token_ids, answer.token_ids)
                assert answer.logprobs[span.start : span.end] == pytest.approx(
                    expected[span.start : span.end], abs=1e-5
                )
            count += 1
        return count

    asking = [asyncio.create_task(ask(i)) for i in range(3)]
    for version in range(1, 201):
        await generator.update_weights(version, buckets_of(shared.models[version % 2]), config=WeightsConfig())
        if version == 40:
            before = [Footprint.of(os.getpid()), Footprint.of(engine_pid)]
    is_over = True
    counts = await asyncio.gather(*asking)
    after = [Footprint.of(os.getpid()), Footprint.of(engine_pid)]

    assert min(counts) > 10
    for then, now in zip(before, after, strict=True):
        assert now.num_files <= then.num_files + 2, f"{then} became {now}"
        assert now.num_mappings_of_weights <= then.num_mappings_of_weights + 1, f"{then} became {now}"
        # Allocators keep some; one version in four would be a leak.
        assert now.anonymous_bytes < then.anonymous_bytes + 160 // 4 * version_bytes, f"{then} became {now}"


@pytest.mark.parametrize("fault", ["cannot load", "engine killed"])
async def test_a_load_that_fails_half_way_is_the_end_of_the_engine(
    generator: Borrower, shared: SharedEngine, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Weights that are half of one version are never sampled from: whoever waits is told, and it must start again."""
    begun: asyncio.Queue[int] = asyncio.Queue()
    running = asyncio.create_task(generator.generate(request(0, max_new_tokens=400), on_begin=begun.put_nowait))
    await begun.get()

    async def fail(update_info: object, *, version: int) -> None:
        raise GeneratorDied("killed") if fault == "engine killed" else RuntimeError("out of memory")

    life = generator._life
    assert life is not None
    monkeypatch.setattr(life.engine, "load", fail)
    with pytest.raises(GeneratorDied):
        await generator.update_weights(1, buckets_of(shared.models[1]), config=WeightsConfig())

    with pytest.raises(GeneratorDied):
        await running
    with pytest.raises(GeneratorDied):
        await generator.generate(request(1))
    monkeypatch.undo()
    await shared.engine.resume()


async def test_scores_are_those_of_a_plain_forward_pass(generator: Borrower, shared: SharedEngine) -> None:
    ids = tuple(3 + 7 * i % 90 for i in range(70))

    found = await generator.score(ids)

    assert found == pytest.approx(reference_logprobs(shared.models[0], ids[:1], ids[1:]), abs=1e-5)


@dataclass(frozen=True)
class Footprint:
    """What a process holds, as the kernel counts it."""

    num_files: int
    num_mappings_of_weights: int
    anonymous_bytes: int

    @classmethod
    def of(cls, pid: int) -> Footprint:
        gc.collect()
        folder = Path(f"/proc/{pid}")
        (anonymous,) = re.findall(r"RssAnon:\s+(\d+) kB", (folder / "status").read_text())
        return cls(
            num_files=len(list((folder / "fd").iterdir())),
            num_mappings_of_weights=(folder / "maps").read_text().count("memfd:weights"),
            anonymous_bytes=int(anonymous) * 1024,
        )
