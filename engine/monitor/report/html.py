"""A report as one HTML page that asks for nothing else: no script, no font, no image from anywhere. Everything that is
shown is escaped; a content security policy keeps what might slip through from doing anything."""

from __future__ import annotations

import itertools
import re
from base64 import b64encode
from collections.abc import Callable, Iterable
from hashlib import sha256
from typing import Any

from engine.monitor.report.document import (
    Bar,
    Bars,
    Block,
    Code,
    Curve,
    Document,
    Figures,
    Section,
    Series,
    Table,
    Text,
    rows_of,
)
from engine.monitor.report.style import CSS
from engine.monitor.report.svg import curve_svg
from engine.monitor.report.text import safe
from engine.monitor.report.words import curve_words

_POLICY = f"default-src 'none'; style-src 'sha256-{b64encode(sha256(CSS.encode()).digest()).decode()}'"
"""This style sheet and nothing else."""

_SHORT = 16
"""Characters of a cell that is not broken."""
_PARTS_OF_A_NAME = re.compile(r"([._])(?=\w)")


def html(document: Document) -> str:
    """The whole page."""
    title = safe(document.title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{safe(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{title}</h1>\n<p class="subtitle">{safe(document.subtitle)}</p>\n'
        f"{''.join(map(_section, document.sections))}</main>\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    heading = f"<h2>{safe(section.title)}</h2>\n" if section.title else ""
    parts = []
    for are_curves, blocks in itertools.groupby(section.blocks, key=lambda block: isinstance(block, Curve)):
        inner = "".join(map(_block, blocks))
        parts.append(f'<div class="curves">\n{inner}</div>\n' if are_curves else inner)
    return f"<section>\n{heading}{''.join(parts)}</section>\n"


def _block(block: Block) -> str:
    return _RENDERERS[type(block)](block)


def _text(text: Text) -> str:
    return f"<p{_class('warning' if text.is_warning else '')}>{safe(text.text)}</p>\n"


def _code(code: Code) -> str:
    about = f"<p>{safe(code.about)}</p>\n" if code.about else ""
    return f"{about}<pre><code>{safe(code.code)}</code></pre>\n"


def _figures(figures: Figures) -> str:
    cards = (
        f"<div><dt>{safe(figure.name)}</dt><dd>{safe(figure.value)}</dd>"
        + (f'<dd class="note">{safe(figure.note)}</dd>' if figure.note else "")
        + "</div>\n"
        for figure in figures.figures
    )
    return f'<dl class="figures">\n{"".join(cards)}</dl>\n'


def _table(table: Table) -> str:
    kinds = ["number" if column.is_number else "" for column in table.columns]
    head = "".join(
        f'<th scope="col"{_class(kind)}>{safe(column.name)}</th>'
        for column, kind in zip(table.columns, kinds, strict=True)
    )
    # Keys and values need no heading to be understood.
    head = f"<thead><tr>{head}</tr></thead>\n" if any(column.name for column in table.columns) else ""
    body = "".join(f"<tr>{_cells(row, kinds)}</tr>\n" for row in table.rows)
    caption = f"<caption>{safe(table.title)}</caption>\n" if table.title and not table.is_folded else ""
    inner = f'<div class="wide"><table>\n{caption}{head}<tbody>\n{body}</tbody></table></div>\n'
    return _folded(table.title, inner) if table.is_folded else inner


def _cells(row: Iterable[str], kinds: list[str]) -> str:
    first, *rest = zip(row, kinds, strict=True)
    return f'<th scope="row"{_class(first[1])}>{_breakable(first[0])}</th>' + "".join(
        f"<td{_class(kind or _width(cell))}>{safe(cell)}</td>" for cell, kind in rest
    )


def _width(cell: str) -> str:
    return "short" if len(cell) <= _SHORT else ""


def _breakable(name: str) -> str:
    """The names of settings and actors are one long word: they may be broken after its parts."""
    return _PARTS_OF_A_NAME.sub(r"\1<wbr>", safe(name)) if name.isprintable() and " " not in name else safe(name)


def _folded(title: str, inner: str) -> str:
    return f"<details><summary>{safe(title)}</summary>\n{inner}</details>\n"


def _bars(bars: Bars) -> str:
    head = f'<th scope="col">{safe(bars.name)}</th><td></td>' + "".join(
        f'<th scope="col" class="number">{safe(name)}</th>' for name in bars.value_names
    )
    legend = "".join(
        f'<li><span class="swatch p{index}"></span>{safe(part)}</li>' for index, part in enumerate(bars.parts)
    )
    legend = f'<ul class="legend">{legend}</ul>\n' if len(bars.parts) > 1 else ""
    rows = "".join(
        f'<tr{_class("beyond" if bar.is_beyond else "")}><th scope="row">{_breakable(bar.name)}</th>'
        f'<td class="bar">{_bar(bar, bars.parts)}</td>'
        + "".join(
            f'<td class="number" data-name="{safe(name)}">{safe(value)}</td>'
            for name, value in zip(bars.value_names, bar.values, strict=True)
        )
        + "</tr>\n"
        for bar in bars.bars
    )
    return (
        f"<h3>{safe(bars.title)}</h3>\n{legend}"
        f'<div class="wide"><table class="bars">\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}</tbody></table></div>\n"
    )


def _bar(bar: Bar, parts: tuple[str, ...]) -> str:
    said = ", ".join(f"{part} {share:.0%}" for part, share in zip(parts, bar.shares, strict=True))
    drawn, x = ['<rect class="rest" width="100" height="14"/>'], 0.0
    for index, share in enumerate(bar.shares):
        width = min(100.0 - x, 100.0 * share)
        kind = "beyond" if bar.is_beyond else f"p{index}"
        drawn.append(f'<rect class="{kind}" x="{x:.2f}" width="{max(0.0, width):.2f}" height="14"/>')
        x += width
    name = safe(f"{bar.name}: {said}")
    return f'<svg viewBox="0 0 100 14" preserveAspectRatio="none" role="img" aria-label="{name}">{"".join(drawn)}</svg>'


def _curve(curve: Curve) -> str:
    words = curve_words(curve)
    unit = f' <span class="unit">{safe(curve.unit)}</span>' if curve.unit else ""
    drawing = curve_svg(curve, name=f"{curve.title}, {curve.unit}" if curve.unit else curve.title, description=words)
    numbers = _table(rows_of(curve)) if drawing else ""
    return (
        f"<figure>\n<figcaption>{safe(curve.title)}{unit}</figcaption>\n"
        f'{drawing}\n{_legend(curve)}<p class="said">{safe(words)}</p>\n{numbers}</figure>\n'
    )


def _legend(curve: Curve) -> str:
    items = [_legend_line(f"line s{index % 4}", series) for index, series in enumerate(curve.series)]
    if curve.limit is not None:
        items.append(f"<li>{_sample('limit')}{safe(curve.limit_name)}</li>")
    if curve.marks:
        items.append(f"<li>{_sample('mark')}{safe(curve.marks[0].name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>\n' if len(items) > 1 else ""


def _legend_line(kind: str, series: Series) -> str:
    return f"<li>{_sample(kind)}{safe(series.name)}</li>"


def _sample(kind: str) -> str:
    return f'<svg viewBox="0 0 26 10" aria-hidden="true"><path class="{kind}" d="M0 5H26"/></svg>'


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


_RENDERERS: dict[type[Block], Callable[[Any], str]] = {
    Text: _text,
    Code: _code,
    Figures: _figures,
    Table: _table,
    Bars: _bars,
    Curve: _curve,
}
