"""Weights that reach an engine on a GPU: on the same GPU, through this machine's memory, and broadcast to it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Literal

import pytest
import torch

from engine.generation.vllm import VllmGenerator
from engine.recipe import SamplerConfig, StudentConfig, VllmConfig, WeightsConfig
from tests.engine.generation.contract import buckets_of, reference_logprobs, request
from tests.support.models import load, tiny_model


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("transfer", "weights_device"),
    [("ipc", "cuda:0"), ("shm", "cuda:0"), ("shm", "cpu"), ("gloo", "cpu"), ("nccl", "cuda:1")],
)
async def test_new_weights_take_over_in_the_middle_of_answers_on_a_gpu(
    tmp_path: Path, transfer: Literal["ipc", "shm", "gloo", "nccl"], weights_device: str
) -> None:
    if weights_device == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL goes between two GPUs, this machine has one")
    config = WeightsConfig(transfer=transfer, bucket_bytes=200_000)
    folders = [tiny_model(tmp_path / str(seed), arch="qwen3", hidden=128, seed=seed, scale=0.1) for seed in (0, 1)]
    models = [load(folder) for folder in folders]
    generator = VllmGenerator(
        config=SamplerConfig(
            backend="vllm",
            num_slots=4,
            device="cuda:0",
            vllm=VllmConfig(kv_cache_bytes=256 << 20, eager=True),
        ),
        student=StudentConfig(path=str(folders[0])),
        max_length=512,
        weights=config,
        weights_device=weights_device,
    )
    sent = [load(folder).to(weights_device) for folder in folders]  # type: ignore[arg-type]
    await generator.start()
    begun: asyncio.Queue[int] = asyncio.Queue()
    asked = [request(i, max_new_tokens=400) for i in range(4)]
    answers = [asyncio.create_task(generator.generate(one, on_begin=begun.put_nowait)) for one in asked]
    for _ in answers:
        await begun.get()

    for version in range(1, 21):
        await generator.update_weights(version, buckets_of(sent[version % 2]), config=config)

    for one, answer in zip(asked, await asyncio.gather(*answers), strict=True):
        assert answer.spans[0].version == 0
        for span in answer.spans:
            expected = reference_logprobs(models[span.version % 2], one.token_ids, answer.token_ids)
            assert answer.logprobs[span.start : span.end] == pytest.approx(expected[span.start : span.end], abs=1e-3)
    await generator.stop()


@pytest.mark.gpu
async def test_copies_of_one_engine_on_several_gpus_answer_alike_and_all_get_new_weights(tmp_path: Path) -> None:
    """Data parallel. vLLM's CPU build cannot: it knows no group of engine cores without devices of their own."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs, this machine has one")
    folders = [tiny_model(tmp_path / str(seed), arch="qwen3", hidden=128, seed=seed, scale=0.1) for seed in (0, 1)]
    models = [load(folder) for folder in folders]
    generator = VllmGenerator(
        config=SamplerConfig(
            backend="vllm",
            num_slots=2,
            device="cuda:0",
            vllm=VllmConfig(kv_cache_bytes=256 << 20, eager=True, data_parallel=2),
        ),
        student=StudentConfig(path=str(folders[0])),
        max_length=512,
    )
    await generator.start()
    await generator.update_weights(1, buckets_of(models[1]), config=WeightsConfig())
    asked = [request(i) for i in range(8)]

    for one, answer in zip(asked, await asyncio.gather(*map(generator.generate, asked)), strict=True):
        expected = reference_logprobs(models[1], one.token_ids, answer.token_ids)
        assert answer.logprobs == pytest.approx(expected, abs=1e-3)
    await generator.stop()
