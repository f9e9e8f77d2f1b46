"""A student of which only an adapter is trained: it travels alone, and answers under way take it over."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.generation.protocol import Bucket
from engine.generation.vllm import VllmGenerator
from engine.objective_config import ObjectiveConfig
from engine.recipe import LearnerConfig, LoraConfig, SamplerConfig, StudentConfig, VllmConfig, WeightsConfig
from engine.training.hf import HFTrainer
from tests.engine.generation.contract import request
from tests.engine.training.cases import make_scored
from tests.support.models import tiny_model

LORA = LoraConfig(rank=4, alpha=8)


def copied(buckets: Iterator[Bucket]) -> list[Bucket]:
    """Valid for longer than it takes to make the next one."""
    return [Bucket(names=one.names, tensors=tuple(tensor.clone() for tensor in one.tensors)) for one in buckets]


@pytest.mark.slow
async def test_adapter_bytes_alone_travel_and_the_engine_then_thinks_what_the_learner_thinks(root: Path) -> None:
    folder = tiny_model(root / "lora", arch="qwen3", hidden=128, max_positions=2048, scale=0.1)
    student = StudentConfig(path=str(folder))
    trainer = HFTrainer(
        config=LearnerConfig(lr=1e-2, micro_batch_tokens=512, lora=LORA),
        student=student,
        objective=ObjectiveConfig(),
        steps=8,
        exports_adapter=True,
    )
    trainer.start()
    generator = VllmGenerator(
        config=SamplerConfig(backend="vllm", num_slots=4, vllm=VllmConfig(kv_cache_bytes=64 << 20)),
        student=student,
        max_length=2048,
        lora=LORA,
    )
    await generator.start()
    ids = tuple(3 + 7 * i % 90 for i in range(60))
    scores = [trainer.score(ids)]
    assert await generator.score(ids) == pytest.approx(scores[0], abs=1e-5)
    sent: list[list[Bucket]] = []
    digests: list[str | None] = []
    for version in range(1, 4):
        trainer.accumulate([make_scored(seed=version)])
        trainer.finish_step()
        sent.append(copied(trainer.export(bucket_bytes=10_000)))
        digests.append(trainer.digest())
        scores.append(trainer.score(ids))

    # Trained before, as an answer takes less time than a step of training may.
    begun: asyncio.Queue[int] = asyncio.Queue()
    asked = request(0, max_new_tokens=1900)
    answering = asyncio.create_task(generator.generate(asked, on_begin=begun.put_nowait))
    await begun.get()
    for version, (buckets, digest) in enumerate(zip(sent, digests, strict=True), start=1):
        await generator.update_weights(version, buckets, config=WeightsConfig(), digest=digest)
        assert await generator.score(ids) == pytest.approx(scores[version], abs=1e-5)
    answer = await answering
    await generator.stop()

    assert max(abs(a - b) for a, b in zip(scores[0], scores[-1], strict=True)) > 0.01, "it has learned something"
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert 10 * sum(tensor.nbytes for bucket in sent[-1] for tensor in bucket.tensors) < size
    assert answer.spans[0].version == 0
    assert len(answer.spans) > 1
    last = answer.spans[-1]
    expected = trainer.score((*asked.token_ids, *answer.token_ids))[len(asked.token_ids) - 1 :]
    assert last.version == 3
    assert answer.logprobs[last.start :] == pytest.approx(expected[last.start :], abs=1e-5)
