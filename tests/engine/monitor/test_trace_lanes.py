"""Overlapping intervals side by side: never one over another, and on no more lanes than it takes."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from engine.monitor.trace.lanes import Lanes

INTERVALS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30)).map(lambda pair: (pair[0], sum(pair))))


def placed(intervals: list[tuple[int, int]]) -> dict[int, list[tuple[int, int]]]:
    lanes, found = Lanes(), dict[int, list[tuple[int, int]]]()
    for start, end in intervals:
        found.setdefault(lanes.place(start, end), []).append((start, end))
    return found


@given(INTERVALS)
def test_intervals_of_one_lane_never_overlap_in_whatever_order_they_come(intervals: list[tuple[int, int]]) -> None:
    for lane in placed(intervals).values():
        lane.sort()
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(lane))


@given(INTERVALS)
def test_in_the_order_of_ends_there_are_as_many_lanes_as_intervals_at_a_time(intervals: list[tuple[int, int]]) -> None:
    at_a_time = max((sum(s <= t < e for s, e in intervals) for t in range(91)), default=0)

    assert sorted(placed(sorted(intervals, key=lambda i: (i[1], i[0])))) == list(range(at_a_time))


def test_an_interval_goes_behind_the_one_that_ended_last_before_it() -> None:
    lanes = Lanes()

    assert [lanes.place(0, 10), lanes.place(0, 12), lanes.place(0, 20)] == [0, 1, 2]
    assert [lanes.place(12, 21), lanes.place(20, 30), lanes.place(21, 31)] == [1, 2, 1]


def test_of_lanes_that_fell_free_together_the_first_is_taken() -> None:
    lanes = Lanes()

    assert [lanes.place(0, 10), lanes.place(0, 10), lanes.place(10, 20), lanes.place(10, 20)] == [0, 1, 0, 1]


def test_intervals_without_length_share_a_lane() -> None:
    lanes = Lanes()

    assert {lanes.place(5, 5) for _ in range(3)} == {0}
