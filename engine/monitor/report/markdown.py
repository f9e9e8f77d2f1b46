"""A report as Markdown (GitHub's), with the same words and numbers as the page: bars and curves are drawn in
characters, the numbers behind a curve are a table that unfolds. Everything that is shown is escaped."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from html import escape
from typing import Any

from engine.monitor.picture import sparkline
from engine.monitor.report.document import (
    Bars,
    Block,
    Code,
    Curve,
    Document,
    Figures,
    Section,
    Table,
    Text,
    rows_of,
)
from engine.monitor.report.text import one_line, visible
from engine.monitor.report.words import curve_words

_CURVE_WIDTH, _BAR_WIDTH = 60, 24
_PARTS = "█░▒▓"
"""Signs of the parts of a bar: they differ in shade."""

_SPECIAL = re.compile(r"([\\`*_{}\[\]~|$])")
_BLOCK_BEGIN = re.compile(r"[#+\-=]|\d+[.)](?!\d)")
"""What makes a heading, a rule or a list out of a paragraph."""


def markdown(document: Document) -> str:
    """The whole report."""
    parts = [f"# {_inline(document.title)}", _paragraph(document.subtitle)]
    for section in document.sections:
        parts += _section(section)
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(section: Section) -> Iterator[str]:
    yield f"## {_inline(section.title)}" if section.title else ""
    for block in section.blocks:
        yield _RENDERERS[type(block)](block)


def _text(text: Text) -> str:
    return f"**{_inline(text.text)}**" if text.is_warning else _paragraph(text.text)


def _code(code: Code) -> str:
    # A fence is longer than any row of backticks within.
    fence = "`" * max(3, 1 + max((len(found) for found in re.findall("`+", code.code)), default=0))
    return _stack(_paragraph(code.about), f"{fence}\n{visible(code.code)}\n{fence}")


def _figures(figures: Figures) -> str:
    return _grid(("", "", ""), (), ((figure.name, figure.value, figure.note) for figure in figures.figures))


def _table(table: Table) -> str:
    numbers = tuple(index for index, column in enumerate(table.columns) if column.is_number)
    grid = _grid(tuple(column.name for column in table.columns), numbers, table.rows)
    return _folded(table.title, grid) if table.is_folded else _stack(_bold(table.title), grid)


def _bars(bars: Bars) -> str:
    legend = "   ".join(f"{sign} {_inline(part)}" for sign, part in zip(_PARTS, bars.parts, strict=False))
    names = (bars.name, "", *bars.value_names)
    rows = (("(!) " * bar.is_beyond + bar.name, _bar(bar.shares), *bar.values) for bar in bars.bars)
    return _stack(
        _bold(bars.title),
        legend if len(bars.parts) > 1 else "",
        _grid(names, tuple(range(2, len(names))), rows),
    )


def _bar(shares: tuple[float, ...]) -> str:
    drawn = ""
    for sign, share in zip(_PARTS, shares, strict=False):
        drawn += sign * min(_BAR_WIDTH - len(drawn), round(share * _BAR_WIDTH))
    return drawn


def _curve(curve: Curve) -> str:
    unit = f", {_inline(curve.unit)}" if curve.unit else ""
    head = _stack(f"{_bold(curve.title)}{unit}", _paragraph(curve_words(curve)))
    if not any(point.y is not None for series in curve.series for point in series.points):
        return head
    return _stack(
        head,
        _code(Code(code="\n".join(_drawn(curve)))),
        _paragraph(f"{curve.limit_name}: {curve.limit:g}") if curve.limit is not None else "",
        *_marks(curve),
        _table(rows_of(curve)),
    )


def _drawn(curve: Curve) -> Iterator[str]:
    names = [one_line(series.name) for series in curve.series]
    for name, series in zip(names, curve.series, strict=True):
        # Far from the ends of floats: neighbours are added up.
        values = (None if point.y is None else max(-1e300, min(1e300, point.y)) for point in series.points)
        label = f"{name.ljust(max(map(len, names)))} " if len(names) > 1 else ""
        yield f"{label}{sparkline(values, _CURVE_WIDTH)}".rstrip()


def _marks(curve: Curve) -> Iterator[str]:
    for name in dict.fromkeys(mark.name for mark in curve.marks):
        places = ", ".join(f"{mark.x:g}" for mark in curve.marks if mark.name == name)
        yield _paragraph(f"{name}: at {curve.x_name} {places}")


def _folded(title: str, inner: str) -> str:
    return _stack(f"<details><summary>{escape(visible(title))}</summary>", inner, "</details>")


def _grid(names: tuple[str, ...], numbers: tuple[int, ...], rows: Iterable[tuple[str, ...]]) -> str:
    rules = "|".join("---:" if index in numbers else "---" for index in range(len(names)))
    return "\n".join([_row(names), f"|{rules}|", *map(_row, rows)])


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(_inline(cell) for cell in cells)} |"


def _stack(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


def _bold(text: str) -> str:
    return f"**{_inline(text)}**" if text else ""


def _paragraph(text: str) -> str:
    if _BLOCK_BEGIN.match(text):
        return f"&#{ord(text[0])};{_inline(text[1:])}"
    return _inline(text)


def _inline(text: str) -> str:
    """Nothing in it is markup any more; line breaks stay visible within a cell, too."""
    return _SPECIAL.sub(r"\\\1", escape(visible(text), quote=False)).replace("\n", "<br>")


_RENDERERS: dict[type[Block], Callable[[Any], str]] = {
    Text: _text,
    Code: _code,
    Figures: _figures,
    Table: _table,
    Bars: _bars,
    Curve: _curve,
}
