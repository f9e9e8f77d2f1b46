"""Rates over a window, and totals that begin again."""

from __future__ import annotations

import pytest

from engine.monitor.readings import Rate, Total


def test_a_rate_counts_the_window_and_forgets_what_is_older() -> None:
    rate = Rate(window_s=10.0)
    rate.begin(0.0)
    rate.add(1.0, 50)
    rate.add(4.0, 50)

    assert rate.per_second(0.5) is None
    assert rate.per_second(5.0) == 20.0
    assert rate.per_second(12.0) == 5.0
    assert rate.per_second(20.0) == 0.0
    assert rate.total == 100


def test_a_total_that_is_smaller_than_before_has_begun_again() -> None:
    total = Total(window_s=10.0)
    for at, reading in ((0.0, 5.0), (1.0, 8.0), (2.0, 1.0), (3.0, 2.0)):
        total.read(at, reading)

    assert total.overall_rate() == pytest.approx((3 + 1 + 1) / 3)


def test_the_recent_rate_is_that_of_the_window() -> None:
    total = Total(window_s=5.0)
    assert total.recent_rate() is None
    for second in range(100):
        total.read(float(second), float(second) if second < 90 else 90.0 + 2 * (second - 90))

    assert total.recent_rate() == pytest.approx(2.0, abs=0.2)
    assert total.overall_rate() == pytest.approx(108 / 99)
