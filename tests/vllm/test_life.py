"""An engine of its own that starts, is killed in the middle of things, and starts again."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from engine.errors import GeneratorDied, ModelError
from engine.generation.vllm import VllmGenerator
from engine.recipe import SamplerConfig, StudentConfig, VllmConfig, WeightsConfig
from tests.engine.generation.contract import buckets_of, reference_logprobs, request
from tests.support.models import load, tiny_model


def make(folder: Path) -> VllmGenerator:
    return VllmGenerator(
        config=SamplerConfig(backend="vllm", num_slots=2, vllm=VllmConfig(kv_cache_bytes=64 << 20)),
        student=StudentConfig(path=str(folder)),
        max_length=512,
    )


async def test_an_engine_that_is_killed_fails_whoever_waits_and_starts_again_as_it_began(root: Path) -> None:
    """Answers, those that wait for a slot, and a weight update: none of them hangs."""
    folders = [tiny_model(root / f"life{seed}", arch="qwen3", hidden=128, seed=seed, scale=0.1) for seed in (0, 1)]
    models = [load(folder) for folder in folders]
    generator = make(folders[0])
    await generator.start()
    await generator.update_weights(1, buckets_of(models[1]), config=WeightsConfig())
    begun: asyncio.Queue[int] = asyncio.Queue()
    answers = [
        asyncio.create_task(generator.generate(request(i, max_new_tokens=500), on_begin=begun.put_nowait))
        for i in range(4)
    ]
    await begun.get()
    await begun.get()
    # It waits for the running answers to end.
    update = asyncio.create_task(generator.update_weights(2, buckets_of(models[0]), config=WeightsConfig(mode="drain")))
    watch = asyncio.create_task(generator.watch())
    assert generator._life is not None
    (pid,) = await generator._life.engine.call_workers("process_id")

    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(60):
        failures = await asyncio.gather(*answers, update, watch, return_exceptions=True)

    assert [type(failure) for failure in failures] == [GeneratorDied] * 6
    with pytest.raises(GeneratorDied):
        await generator.generate(request(9))
    with pytest.raises(GeneratorDied):
        await generator.update_weights(3, buckets_of(models[1]), config=WeightsConfig())
    await generator.stop()
    await generator.start()
    asked = request(0)
    answer = await generator.generate(asked)
    await generator.stop()

    assert [span.version for span in answer.spans] == [0]
    assert answer.logprobs == pytest.approx(reference_logprobs(models[0], asked.token_ids, answer.token_ids), abs=1e-5)


async def test_what_vllm_cannot_run_is_refused_before_a_process_is_started(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", arch="qwen3", hidden=128)
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"qwen3"', '"unheard_of"'))

    with pytest.raises(ModelError, match=r"model"):
        await make(folder).start()
    with pytest.raises(ModelError, match=r"no config\.json"):
        await make(tmp_path / "nowhere").start()
