"""Random streams belong to identities, on every machine and for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.streams import stream_key, uniform

PARTS = st.lists(st.integers(-(2**64), 2**64), max_size=5)


def test_keys_are_the_same_on_every_machine_and_version() -> None:
    """A changed value here means that no older run can be repeated."""
    assert stream_key("sample", 0, 0, 7, 1) == 16343186401216232906
    assert stream_key("shuffle", 42, 3) == 6465498753266570493
    assert uniform(stream_key("sample", 0, 0, 7, 1)) == pytest.approx(0.7268760554754637, abs=1e-15)


@given(st.sampled_from(["sample", "shuffle", "uniform"]), PARTS)
def test_a_key_is_64_bits_and_depends_on_its_arguments_alone(purpose: str, parts: list[int]) -> None:
    key = stream_key(purpose, *parts)

    assert 0 <= key < 2**64
    assert key == stream_key(purpose, *parts)
    assert 0.0 <= uniform(key) < 1.0


@given(PARTS, PARTS)
def test_different_parts_give_different_keys(one: list[int], other: list[int]) -> None:
    assert (stream_key("sample", *one) == stream_key("sample", *other)) == (one == other)


def test_a_different_purpose_gives_an_unrelated_key() -> None:
    assert len({stream_key(purpose, 1, 2) for purpose in ("sample", "shuffle", "lambda", "teacher")}) == 4


def test_first_draws_of_neighbouring_streams_are_uniform() -> None:
    draws = sorted(uniform(stream_key("sample", 0, 0, prompt, 0)) for prompt in range(4_000))
    largest_gap = max(abs(draw - (rank + 0.5) / len(draws)) for rank, draw in enumerate(draws))

    assert largest_gap < 1.63 / len(draws) ** 0.5  # Kolmogorov-Smirnov at 1 %; the draws are the same every time
