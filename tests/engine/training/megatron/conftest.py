"""One pool of ranks for all tests of what runs in them: to start one takes most of a test's time."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from tests.support.worlds import Worlds

MAX_RANKS = 4


@pytest.fixture(scope="session")
def worlds() -> Iterator[Worlds]:
    if importlib.util.find_spec("megatron") is None:
        pytest.skip("the learner on Megatron is an extra")
    with Worlds(MAX_RANKS) as pool:
        yield pool
