"""Numbers on their way to a drawing: thinned, scaled, drawn."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.monitor.report.document import Curve, Point, Series, rows_of
from engine.monitor.report.scale import Scale, tick_texts, ticks
from engine.monitor.report.svg import HEIGHT, WIDTH, curve_svg
from engine.monitor.report.thin import thin
from engine.monitor.report.words import curve_words

FINITE = st.floats(allow_nan=False, allow_infinity=False)
ANY = st.none() | st.floats()


def curve_of(values: list[float | None], **fields: float) -> Curve:
    points = thin([(float(x), y) for x, y in enumerate(values)])
    return Curve(title="Loss", unit="nats", x_name="step", series=(Series(name="loss", points=points),), **fields)  # type: ignore[arg-type]


def test_a_short_series_stays_as_it_is() -> None:
    assert thin([(1.0, 0.5), (2.0, None), (3.0, math.nan)]) == (
        Point(x=1.0, y=0.5),
        Point(x=2.0, y=None),
        Point(x=3.0, y=None),
    )


def test_a_long_series_keeps_its_peaks_its_gaps_and_its_end() -> None:
    values: list[tuple[float, float | None]] = [(float(x), 1.0) for x in range(10_000)]
    values[5_000] = (5_000.0, 99.0)
    values[7_000:7_500] = [(float(x), None) for x in range(7_000, 7_500)]
    points = thin(values)

    assert len(points) == 160
    assert max(point.high for point in points if point.high is not None) == 99.0
    assert any(point.y is None for point in points)
    assert points[-1] == Point(x=9_999.0, y=1.0)


@given(st.lists(ANY, max_size=700), st.integers(2, 300))
def test_thinning_loses_no_value_and_no_order(values: list[float | None], limit: int) -> None:
    points = thin([(float(x), y) for x, y in enumerate(values)], limit=limit)

    assert len(points) <= limit
    xs = [point.x for point in points]
    assert xs == sorted(set(xs))
    finite = [y for y in values if y is not None and math.isfinite(y)]
    lows = [low for p in points if (low := p.y if p.low is None else p.low) is not None]
    highs = [high for p in points if (high := p.y if p.high is None else p.high) is not None]
    assert (min(lows, default=None), max(highs, default=None)) == (min(finite, default=None), max(finite, default=None))


@given(FINITE, FINITE)
def test_ticks_enclose_the_values_in_order(one: float, other: float) -> None:
    low, high = sorted((one, other))
    found = ticks(low, high)

    assert 2 <= len(found) <= 12
    assert found == sorted(found)
    assert found[0] <= low or found[0] - low <= (found[-1] - found[0]) * 1e-6
    assert found[-1] >= high or high - found[-1] <= (found[-1] - found[0]) * 1e-6
    assert all(text.isascii() for text in tick_texts(found))


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0.57, 1.31, ["0.5", "1.0", "1.5"]),
        (0.0, 2.0, ["0", "1", "2"]),
        (0.0, 3e-4, ["0", "0.0001", "0.0002", "0.0003"]),
        (0.0, 1e-6, ["0", "5e-7", "1e-6"]),
        (0.0, 4e7, ["0", "2e7", "4e7"]),
        (7.0, 7.0, ["0", "5", "10", "15"]),
        (0.0, 0.0, ["-0.5", "0", "0.5"]),
    ],
)
def test_ticks_are_round_and_say_so(low: float, high: float, texts: list[str]) -> None:
    assert tick_texts(ticks(low, high)) == texts


def test_whole_ticks_have_no_fractions() -> None:
    assert ticks(1, 2, whole=True) == [1, 2]


@given(FINITE, FINITE, FINITE)
def test_a_scale_never_gives_what_is_no_number(low: float, high: float, value: float) -> None:
    low, high = sorted((low, high))
    place = Scale(low=low, high=high, start=0.0, end=100.0)(min(max(value, low), high))

    assert -1e-9 <= place <= 100.0 + 1e-9


@given(st.lists(ANY, max_size=400))
def test_a_drawing_is_well_formed_and_within_its_frame(values: list[float | None]) -> None:
    curve = curve_of(values)
    drawing = curve_svg(curve, name="Loss", description=curve_words(curve))
    if not any(y is not None and math.isfinite(y) for y in values):
        assert drawing == ""
        return
    root = ElementTree.fromstring(drawing)

    assert root.find("title") is not None
    assert root.find("desc") is not None
    assert "nan" not in drawing
    assert "inf" not in drawing
    for element in root:
        for found in re.findall(r"(-?[\d.]+) (-?[\d.]+)", element.get("d", "")):
            assert 0 <= float(found[0]) <= WIDTH
            assert 0 <= float(found[1]) <= HEIGHT


def test_a_gap_interrupts_the_line_and_a_lonely_value_is_a_dot() -> None:
    drawing = curve_svg(curve_of([1.0, 2.0, None, 3.0]), name="Loss", description="")

    assert len(re.findall('class="line', drawing)) == 1
    assert len(re.findall('class="dot', drawing)) == 3


def test_a_limit_is_part_of_the_picture() -> None:
    drawing = curve_svg(curve_of([0.0, 1.0], limit=4.0), name="Staleness", description="")

    assert 'class="limit"' in drawing
    assert ">4<" in drawing


def test_the_words_of_a_curve_have_its_ends_and_its_extremes() -> None:
    assert curve_words(curve_of([2.0, 0.5, None, 1.0])) == ("from 2 to 1, lowest 0.5, highest 2. Gaps: not finite.")
    assert curve_words(curve_of([None])) == "no finite value."
    assert curve_words(curve_of([1.5])) == "once, 1.5."


def test_the_numbers_behind_a_curve_are_all_of_its_points() -> None:
    table = rows_of(
        Curve(
            title="Staleness",
            unit="versions",
            x_name="step",
            series=(
                Series(name="mean", points=(Point(x=1, y=0.5), Point(x=2, y=None))),
                Series(name="oldest", points=(Point(x=2, y=2.0, low=1.0, high=3.0),)),
            ),
        )
    )

    assert [column.name for column in table.columns] == ["step", "mean", "oldest"]
    assert table.rows == (("1", "0.5", ""), ("2", "not finite", "2 (1 to 3)"))
