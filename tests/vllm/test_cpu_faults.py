"""Is each patch of ``cpu_faults`` still needed? One that is not fails here, and can go."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from engine.check.student import VLLM_CPU_HEAD_SIZES
from engine.recipe import WeightsConfig
from tests.engine.generation.contract import buckets_of, reference_logprobs, request
from tests.vllm.shared_engine import Borrower, SharedEngine

pytestmark = pytest.mark.asyncio(loop_scope="session")


@asynccontextmanager
async def without_patch(shared: SharedEngine, fault: str) -> AsyncIterator[Borrower]:
    generator = await shared.lend()
    await shared.engine.call_workers("mend_cpu_fault", fault, False)
    try:
        yield generator
    finally:
        await shared.engine.call_workers("mend_cpu_fault", fault, True)
        await generator.stop()


async def error_after_update(generator: Borrower, shared: SharedEngine) -> float:
    """Largest difference to a plain forward pass under the weights that were just sent."""
    await generator.update_weights(1, buckets_of(shared.models[1]), config=WeightsConfig())
    asked = request(0, prompt=range(3, 40), max_new_tokens=30)
    answer = await generator.generate(asked)
    expected = reference_logprobs(shared.models[1], asked.token_ids, answer.token_ids)
    return max(abs(a - b) for a, b in zip(expected, answer.logprobs, strict=True))


async def test_a_tied_head_keeps_its_old_weights_without_the_patch(shared: SharedEngine) -> None:
    async with without_patch(shared, "tied head") as generator:
        assert await error_after_update(generator, shared) > 1e-3


@pytest.mark.parametrize("fault", ["interleaved rope", "experts"])
async def test_latent_attention_and_experts_go_wrong_without_the_patch(shared_moe: SharedEngine, fault: str) -> None:
    async with without_patch(shared_moe, fault) as generator:
        assert await error_after_update(generator, shared_moe) > 1e-3


async def test_with_all_patches_an_update_is_right(shared: SharedEngine, shared_moe: SharedEngine) -> None:
    for engine in (shared, shared_moe):
        generator = await engine.lend()
        assert await error_after_update(generator, engine) < 1e-5
        await generator.stop()


async def test_heads_are_checked_against_what_the_cpu_backend_says_of_itself() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert tuple(CPUAttentionBackend.get_supported_head_sizes()) == VLLM_CPU_HEAD_SIZES
