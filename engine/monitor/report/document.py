"""What a report consists of: sections of a few kinds of blocks, already worded and rounded. Both renderings (``html``,
``markdown``) show every part of it, so they cannot say different things.

All strings are plain text from anywhere, also from a model: renderers escape.
"""

from __future__ import annotations

import msgspec


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Base of everything below."""


class Text(Part, frozen=True, kw_only=True):
    """A paragraph."""

    text: str
    is_warning: bool = False


class Code(Part, frozen=True, kw_only=True):
    """To be copied as it is."""

    code: str
    about: str = ""


class Figure(Part, frozen=True, kw_only=True):
    """One number worth a place of its own."""

    name: str
    value: str
    note: str = ""


class Figures(Part, frozen=True, kw_only=True):
    figures: tuple[Figure, ...]


class Column(Part, frozen=True, kw_only=True):
    name: str
    is_number: bool = False
    """Aligned at its right side."""


class Table(Part, frozen=True, kw_only=True):
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    """Each as long as ``columns``; the first cell names the row."""
    title: str = ""
    is_folded: bool = False
    """Shown when asked for; needs a title."""


class Bar(Part, frozen=True, kw_only=True):
    name: str
    shares: tuple[float, ...]
    """One of each of the parts, of 1 in all."""
    values: tuple[str, ...]
    """In words, one for each of ``Bars.value_names``."""
    is_beyond: bool = False
    """Where nothing should be."""


class Bars(Part, frozen=True, kw_only=True):
    """Horizontal bars over one scale from 0 to 1."""

    title: str
    name: str
    """What each bar stands for."""
    parts: tuple[str, ...]
    """Side by side within each bar."""
    value_names: tuple[str, ...]
    bars: tuple[Bar, ...]


class Point(Part, frozen=True, kw_only=True):
    x: float
    y: float | None
    """None: a gap."""
    low: float | None = None
    """With ``high``: the extremes of what this point is the mean of; None when it stands for itself."""
    high: float | None = None


class Series(Part, frozen=True, kw_only=True):
    name: str
    points: tuple[Point, ...]
    """In the order of x."""


class Mark(Part, frozen=True, kw_only=True):
    """A place on the x axis where something happened."""

    x: float
    name: str


class Curve(Part, frozen=True, kw_only=True):
    """Series over one x axis, with one y axis."""

    title: str
    unit: str
    x_name: str
    series: tuple[Series, ...]
    limit: float | None = None
    """A line that the values should stay under."""
    limit_name: str = ""
    marks: tuple[Mark, ...] = ()
    from_zero: bool = False
    """The y axis begins at 0."""


Block = Text | Code | Figures | Table | Bars | Curve


class Section(Part, frozen=True, kw_only=True):
    title: str
    blocks: tuple[Block, ...]


class Document(Part, frozen=True, kw_only=True):
    title: str
    subtitle: str
    sections: tuple[Section, ...]


def rows_of(curve: Curve) -> Table:
    """The numbers behind a curve; a mean is followed by the extremes of what it stands for."""
    columns = [Column(name=curve.x_name, is_number=True)]
    columns += [Column(name=series.name, is_number=True) for series in curve.series]
    cells: dict[float, dict[int, str]] = {}
    for index, series in enumerate(curve.series):
        for point in series.points:
            cells.setdefault(point.x, {})[index] = point_text(point)
    rows = tuple((f"{x:g}", *(cells[x].get(index, "") for index in range(len(curve.series)))) for x in sorted(cells))
    return Table(columns=tuple(columns), rows=rows, title=f"{curve.title}: the numbers", is_folded=True)


def point_text(point: Point) -> str:
    if point.y is None:
        return "not finite"
    if point.low is None or point.high is None or point.low == point.high:
        return f"{point.y:.4g}"
    return f"{point.y:.4g} ({point.low:.4g} to {point.high:.4g})"
