"""Uniform numbers: a function of key and counter, uniform, and unrelated between streams."""

from __future__ import annotations

import numpy as np
import pytest

from engine.generation.draws import uniforms
from engine.streams import stream_key


def draw(keys: list[int], counters: list[int]) -> list[float]:
    numbers: list[float] = uniforms(np.array(keys, dtype=np.uint64), np.array(counters, dtype=np.uint64)).tolist()
    return numbers


def mix(bits: int) -> int:
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
    return bits ^ bits >> 31


@pytest.mark.parametrize(("key", "counter"), [(0, 0), (1, 0), (2**64 - 1, 7), (12345678901234567890, 4096)])
def test_a_number_is_the_top_53_bits_of_the_mixed_key_and_counter(key: int, counter: int) -> None:
    bits = mix(mix(key) ^ mix((counter + 1) * 0x9E3779B97F4A7C15 % 2**64))

    assert draw([key], [counter]) == [(bits >> 11) / 2**53]


def test_a_number_depends_on_its_own_key_and_counter_alone() -> None:
    together = draw([5, 6, 7], [1, 2, 3])

    assert together == [*draw([5], [1]), *draw([6], [2]), *draw([7], [3])]


def test_numbers_are_uniform_in_the_unit_interval() -> None:
    numbers = uniforms(np.full(100_000, 42, dtype=np.uint64), np.arange(100_000, dtype=np.uint64))

    assert 0 <= numbers.min() < numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=100, range=(0, 1))
    # 99 degrees of freedom: 200 is beyond the 1e-8 quantile.
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 200


@pytest.mark.parametrize("shift", [1, 2, 0x9E3779B97F4A7C15])
def test_streams_whose_keys_lie_close_do_not_run_into_each_other(shift: int) -> None:
    key = stream_key("sample", 1)
    counters = np.arange(2_000, dtype=np.uint64)
    one = uniforms(np.full(2_000, key, dtype=np.uint64), counters)
    other = uniforms(np.full(2_000, (key + shift) % 2**64, dtype=np.uint64), counters)

    assert len(np.intersect1d(one, other)) == 0
    assert abs(float(np.corrcoef(one, other)[0, 1])) < 0.1
