"""Busy time is the union of overlapping pieces of work."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.monitor.intervals import BusyTime

pieces = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=30)


@given(pieces, st.integers(0, 80), st.integers(0, 80))
def test_seconds_are_counted_once_however_the_pieces_overlap(found: list[tuple[int, int]], a: int, b: int) -> None:
    busy = BusyTime()
    intervals = sorted(((start, start + length) for start, length in found), key=lambda piece: piece[1])
    for start, end in intervals:
        busy.add(start, end)

    seconds = {second for start, end in intervals for second in range(start, end)}
    low, high = min(a, b), max(a, b)
    assert busy.total_s == len(seconds)
    assert busy.within(low, high) == len([second for second in seconds if low <= second < high])


def test_thousands_of_pieces_take_little_memory_and_stay_right() -> None:
    busy = BusyTime()
    for n in range(50_000):
        busy.add(n, n + 0.25)

    assert busy.total_s == 12_500.0
    assert busy.within(49_990, 50_000) == 2.5
    assert busy.within(20_000, 50_000) == pytest.approx(7_500, rel=1e-3), "older pieces, in blocks"
    assert len(busy._pieces) + len(busy._blocks) < 1_000


def test_a_piece_that_ends_before_an_earlier_one_fills_only_the_gap() -> None:
    busy = BusyTime()
    busy.add(0, 1)
    busy.add(5, 6)
    busy.add(0.5, 3)

    assert busy.total_s == 4.0
    assert busy.within(0, 4) == 3.0
