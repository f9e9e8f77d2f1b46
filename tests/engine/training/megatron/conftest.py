"""A pool of ranks for the tests of a file: to start one takes most of a test's time.

Not for all of them: Megatron's process groups keep three threads each, and live on after their world has ended. After
fifty worlds a rank has thousands of threads, and is slow.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from tests.support.worlds import Worlds

MAX_RANKS = 4


@pytest.fixture(scope="module")
def worlds() -> Iterator[Worlds]:
    if importlib.util.find_spec("megatron") is None:
        pytest.skip("the learner on Megatron is an extra")
    with Worlds(MAX_RANKS) as pool:
        yield pool
