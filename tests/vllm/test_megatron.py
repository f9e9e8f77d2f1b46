"""What vLLM makes of weights that come from Megatron's ranks: the log-probabilities that the ranks compute."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from engine.megatron_config import MegatronConfig
from engine.objective_config import ObjectiveConfig
from engine.recipe import LearnerConfig, StudentConfig, WeightsConfig
from engine.training.megatron import MegatronTrainer
from tests.vllm.shared_engine import SharedEngine

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="the learner on Megatron is an extra"),
]

IDS = tuple(3 + 7 * i % 90 for i in range(70))


async def difference_after_update(shared: SharedEngine, folder: Path, logs: Path, **layout: Any) -> float:
    """Largest, in nats, between the engine and the ranks whose weights it was sent."""
    trainer = MegatronTrainer(
        config=LearnerConfig(backend="megatron", megatron=MegatronConfig(dtype="float32", **layout)),
        student=StudentConfig(path=str(folder)),
        objective=ObjectiveConfig(),
        steps=1,
        folder=logs,
    )
    generator = await shared.lend()
    try:
        await asyncio.to_thread(trainer.start)
        digest = await asyncio.to_thread(trainer.digest)
        before = await generator.score(IDS)
        buckets = trainer.export(bucket_bytes=1 << 16)
        await generator.update_weights(1, buckets, config=WeightsConfig(), digest=digest)
        expected = await asyncio.to_thread(trainer.score, IDS)
        found = await generator.score(IDS)
    finally:
        await generator.stop()
        trainer.stop()
    assert found != pytest.approx(before, abs=1e-2), "the ranks' student is another one than the engine had"
    return max(abs(a - b) for a, b in zip(expected, found, strict=True))


async def test_a_dense_student_with_a_tied_head(shared: SharedEngine, root: Path, tmp_path: Path) -> None:
    assert await difference_after_update(shared, root / "tied1", tmp_path, tensor_parallel=2) < 1e-5


async def test_latent_attention_and_experts(shared_moe: SharedEngine, root: Path, tmp_path: Path) -> None:
    layout = {"data_parallel": 2, "expert_parallel": 2}
    assert await difference_after_update(shared_moe, root / "moe1", tmp_path, **layout) < 1e-5
