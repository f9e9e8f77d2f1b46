"""Weights that reach an engine on a GPU: on the same GPU, through this machine's memory, and broadcast to it. Teachers
on a GPU, which score ids that the caller names: ours, and a stock server, which can do that nowhere else."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from engine.generation.vllm import VllmGenerator
from engine.recipe import SamplerConfig, StudentConfig, VllmConfig, WeightsConfig
from teacher.client import TeacherClient
from teacher.same_tokens import known
from teacher.vllm_client import VllmClient
from tests.engine.generation.contract import buckets_of, reference_logprobs, request
from tests.support.models import load, tiny_model
from tests.teacher.test_backend_torch import make_request, reference_scores
from tests.vllm.stock_server import stock_server
from tests.vllm.test_teacher import ask, service


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
@pytest.mark.parametrize("kind", ["service", "stock"])
async def test_ids_that_the_caller_names_are_scored_on_a_gpu(tmp_path: Path, kind: Literal["service", "stock"]) -> None:
    folder = tiny_model(tmp_path / "m", arch="qwen3", hidden=128, layers=2, max_positions=512, scale=0.1, seed=5)
    rng = np.random.default_rng(0)
    requests = [make_request(rng, num_prompt=40, num_response=30, top_k=16, num_extra=5) for _ in range(6)]
    vocabulary = known(AutoTokenizer.from_pretrained(folder), vocab_size=384, source="the model")

    with ExitStack() as processes:
        client: TeacherClient | VllmClient
        if kind == "stock":
            options = ["--enable-scale-out", "--max-logprobs", "16", "--gpu-memory-utilization", "0.2"]
            client = VllmClient(processes.enter_context(stock_server(folder, tmp_path, *options)).url, known=vocabulary)
        else:
            _, url = processes.enter_context(service(folder, "--device", "cuda:0"))
            client = TeacherClient(url, values="float32")
        async with client:
            assert (await client.info()).gives_extra_ids
            answers = await asyncio.gather(*(ask(client, one) for one in requests))

    model = load(folder)
    for one, answer in zip(requests, answers, strict=True):
        expected = reference_scores(model, one)
        assert answer.extra_logprobs is not None
        assert expected.extra_logprobs is not None
        for found, wanted in (
            (answer.extra_logprobs, expected.extra_logprobs),
            (answer.top_logprobs, expected.top_logprobs),
            (answer.sampled_logprobs, expected.sampled_logprobs),
        ):
            np.testing.assert_allclose(found, wanted, atol=1e-3, rtol=0)
