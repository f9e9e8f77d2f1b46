"""Process groups for the tests of vocabulary shards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four of them, for groups of one to four."""
    with Ranks(4) as ranks:
        yield ranks
