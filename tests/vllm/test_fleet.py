"""Two engines behind one generator, one of which is killed."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from engine.errors import AnswerLost
from engine.generation.protocol import Generation
from engine.generation.vllm_fleet import VllmFleet
from engine.recipe import SamplerConfig, StudentConfig, VllmConfig, WeightsConfig
from tests.engine.generation.contract import buckets_of, reference_logprobs, request
from tests.support.models import load, tiny_model


@pytest.mark.slow
async def test_an_engine_that_is_killed_is_started_again_alone_with_the_present_weights(root: Path) -> None:
    """Only its own answers are lost. The other one goes on, takes everything meanwhile, and gets the next version."""
    folders = [tiny_model(root / f"fleet{seed}", arch="qwen3", hidden=128, seed=seed, scale=0.1) for seed in (0, 1)]
    models = [load(folder) for folder in folders]
    fleet = VllmFleet(
        config=SamplerConfig(backend="vllm", num_slots=2, vllm=VllmConfig(kv_cache_bytes=64 << 20, num_engines=2)),
        student=StudentConfig(path=str(folders[0])),
        max_length=512,
    )
    await fleet.start()
    await fleet.update_weights(1, buckets_of(models[1]), config=WeightsConfig())
    begun: asyncio.Queue[int] = asyncio.Queue()
    answers = [
        asyncio.create_task(
            fleet.generate(request(i, prompt=range(3 + i, 20), max_new_tokens=400), on_begin=begun.put_nowait)
        )
        for i in range(4)
    ]
    assert [await begun.get() for _ in answers] == [1] * 4
    assert fleet.statistics().running == 4
    life = fleet._places[0].generator._life
    assert life is not None
    (pid,) = await life.engine.call_workers("process_id")

    os.kill(pid, signal.SIGKILL)
    outcomes = await asyncio.gather(*answers, return_exceptions=True)

    assert [type(outcome) for outcome in outcomes].count(AnswerLost) == 2
    assert sum(isinstance(outcome, Generation) for outcome in outcomes) == 2
    await fleet.update_weights(2, buckets_of(models[0]), config=WeightsConfig())
    alone = await asyncio.gather(*(fleet.generate(request(10 + i)) for i in range(4)))
    assert not fleet._places[0].is_live, "this test is about the time in which it starts"
    # Waits for all engines.
    asked = [request(20 + i) for i in range(4)]
    wave = await fleet.generate_wave(asked)
    assert {span.version for answer in [*alone, *wave] for span in answer.spans} == {2}
    assert fleet._places[0].generator.statistics().tokens_total > 0
    for one, answer in zip(asked, wave, strict=True):
        expected = reference_logprobs(models[0], one.token_ids, answer.token_ids)
        assert max(abs(a - b) for a, b in zip(expected, answer.logprobs, strict=True)) < 1e-5
    await fleet.update_weights(3, buckets_of(models[1]), config=WeightsConfig())
    assert fleet.statistics().version == 3
    await fleet.stop()
