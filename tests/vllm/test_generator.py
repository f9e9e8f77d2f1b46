"""The vLLM generator: the common contract, and what only it promises."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from engine.generation.protocol import Generator
from tests.engine.generation.contract import GeneratorContract, Subject
from tests.vllm.shared_engine import Borrower, SharedEngine

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(loop_scope="session")
async def generator(shared: SharedEngine) -> AsyncIterator[Borrower]:
    generator = await shared.lend()
    yield generator
    await generator.stop()


class TestVllm(GeneratorContract):
    @pytest_asyncio.fixture(loop_scope="session")
    async def subject(self, shared: SharedEngine) -> AsyncIterator[Subject]:
        lent: list[Borrower] = []

        async def start() -> Generator:
            lent.append(await shared.lend())
            return lent[-1]

        yield Subject(
            start=start,
            num_slots=shared.config.num_slots,
            models=shared.models,
            tolerance=1e-5,
            max_positions=shared.max_length,
        )
        for generator in lent:
            await generator.stop()
