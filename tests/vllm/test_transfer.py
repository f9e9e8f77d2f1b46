"""Versions that are broadcast to an engine instead of mapped by it."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from engine.errors import GeneratorDied, RecipeError
from engine.generation.vllm import VllmGenerator
from engine.recipe import SamplerConfig, StudentConfig, VllmConfig, WeightsConfig
from tests.engine.generation.contract import buckets_of, reference_logprobs, request
from tests.support.models import load, tiny_model


@pytest.mark.slow
@pytest.mark.parametrize(
    "vllm",
    [
        VllmConfig(kv_cache_bytes=64 << 20, tensor_parallel=2),
        VllmConfig(kv_cache_bytes=64 << 20, data_parallel=2),
    ],
    ids=["two halves", "two copies"],
)
async def test_weights_come_over_gloo_to_every_rank_while_answers_go_on(root: Path, vllm: VllmConfig) -> None:
    """Two workers; buckets of a few tensors. When one is killed, the sender does not wait for it."""
    folders = [tiny_model(root / f"gloo{seed}", arch="qwen3", hidden=128, seed=seed, scale=0.1) for seed in (0, 1)]
    models = [load(folder) for folder in folders]
    config = WeightsConfig(transfer="gloo", bucket_bytes=200_000)
    generator = VllmGenerator(
        config=SamplerConfig(backend="vllm", num_slots=2, vllm=vllm),
        student=StudentConfig(path=str(folders[0])),
        max_length=512,
        weights=config,
    )
    await generator.start()
    begun: asyncio.Queue[int] = asyncio.Queue()
    asked = [request(i, max_new_tokens=300) for i in range(2)]
    answers = [asyncio.create_task(generator.generate(one, on_begin=begun.put_nowait)) for one in asked]
    for _ in answers:
        await begun.get()
    for version in range(1, 7):
        await generator.update_weights(version, buckets_of(models[version % 2]), config=config)
    for one, answer in zip(asked, await asyncio.gather(*answers), strict=True):
        assert answer.spans[0].version == 0
        assert len(answer.spans) > 1
        for span in answer.spans:
            expected = reference_logprobs(models[span.version % 2], one.token_ids, answer.token_ids)
            assert answer.logprobs[span.start : span.end] == pytest.approx(expected[span.start : span.end], abs=1e-5)

    assert generator._life is not None
    assert generator._life.engine.num_workers == 2
    pids = await generator._life.engine.call_workers("process_id")
    os.kill(pids[-1], signal.SIGKILL)
    async with asyncio.timeout(60):
        with pytest.raises(GeneratorDied):
            await generator.update_weights(7, buckets_of(models[1]), config=config)
    await generator.stop()


@pytest.mark.parametrize(
    ("transfer", "device", "weights_device", "message"),
    [
        ("ipc", "cuda:1", "cuda:0", r"weights\.transfer='ipc' needs one engine on the one GPU"),
        ("ipc", "cpu", "cpu", r"weights\.transfer='ipc' needs one engine on the one GPU"),
        ("nccl", "cuda:0", "cpu", r"weights\.transfer='nccl' goes from GPU to GPU"),
        ("nccl", "cuda:0", "cuda:0", r"learner and sampler both use 'cuda:0'"),
    ],
)
def test_a_way_that_does_not_lead_between_these_devices_is_refused(
    transfer: str, device: str, weights_device: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        VllmGenerator(
            config=SamplerConfig(backend="vllm", device=device, vllm=VllmConfig(kv_cache_bytes=1 << 20)),
            student=StudentConfig(path="nowhere"),
            weights=WeightsConfig(transfer=transfer),  # type: ignore[arg-type]
            weights_device=weights_device,
        )
