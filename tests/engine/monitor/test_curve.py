"""A run of any length in few points."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.monitor.curve import Curve


def curve_of(values: list[float | None], *, max_points: int = 8) -> Curve:
    curve = Curve(max_points=max_points)
    for step, value in enumerate(values, start=1):
        curve.add(step, value)
    return curve


@given(num_steps=st.integers(0, 300), max_points=st.integers(2, 40))
def test_it_never_has_more_points_than_allowed_and_ends_with_the_last_step(num_steps: int, max_points: int) -> None:
    points = curve_of([float(step) for step in range(1, num_steps + 1)], max_points=max_points).points()
    steps = [step for step, _ in points]

    assert len(points) <= max_points
    assert steps == sorted(set(steps))
    assert steps[-1:] == ([num_steps] if num_steps else [])
    assert num_steps < max_points or len(points) >= max_points // 2


@given(values=st.lists(st.floats(-100, 100), min_size=1, max_size=200))
def test_each_point_is_the_mean_of_the_steps_since_the_one_before(values: list[float]) -> None:
    begin = 0
    for step, mean in curve_of(list(values)).points():
        assert mean == pytest.approx(sum(values[begin:step]) / (step - begin), abs=1e-9)
        begin = step


def test_a_few_steps_are_kept_as_they_are() -> None:
    assert curve_of([3.0, None, math.nan, 1.0]).points() == [(1, 3.0), (2, None), (3, None), (4, 1.0)]


def test_what_is_not_finite_does_not_spoil_its_neighbours() -> None:
    assert curve_of([1.0, math.inf, 2.0, None, None, 4.0], max_points=4).points() == [(2, 1.0), (4, 2.0), (6, 4.0)]


def test_a_resumed_run_does_steps_again() -> None:
    curve = curve_of([5.0, 4.0, 3.0, 2.0])
    curve.add(3, 3.5)

    assert curve.points() == [(1, 5.0), (2, 4.0), (3, 3.5)]


def test_a_curve_of_one_point_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 points, got 1"):
        Curve(max_points=1)
