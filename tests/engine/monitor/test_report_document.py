"""Both renderings of one document: the same content, and nothing of it is markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.monitor.report.document import (
    Bar,
    Bars,
    Block,
    Code,
    Column,
    Curve,
    Document,
    Figure,
    Figures,
    Mark,
    Point,
    Section,
    Series,
    Table,
    Text,
)
from engine.monitor.report.html import html
from engine.monitor.report.markdown import markdown
from engine.monitor.report.style import CSS
from engine.monitor.report.text import one_line, visible

HOSTILE = "<script>alert(1)</script>\"'&amp; </title></style><img src=x onerror=alert(1)> | `a` *b* [c](d) \u202egnp"


def document_of(*blocks: Block) -> Document:
    return Document(title="Run", subtitle="of a test", sections=(Section(title="Part", blocks=blocks),))


def everything(text: str) -> Document:
    """One of each kind of block, with ``text`` wherever text may stand."""
    points = (Point(x=1.0, y=1.25), Point(x=2.0, y=None), Point(x=3.0, y=2.5, low=2.0, high=4.0))
    return Document(
        title=text,
        subtitle=text,
        sections=(
            Section(
                title=text,
                blocks=(
                    Text(text=text),
                    Text(text=text, is_warning=True),
                    Code(code=text, about=text),
                    Figures(figures=(Figure(name=text, value=text, note=text),)),
                    Table(
                        columns=(Column(name=text), Column(name="n", is_number=True)), rows=((text, "7"),), title=text
                    ),
                    Table(columns=(Column(name=text),), rows=((text,),), title=text, is_folded=True),
                    Bars(
                        title=text,
                        name=text,
                        parts=(text, "rest"),
                        value_names=(text,),
                        bars=(Bar(name=text, shares=(0.25, 0.75), values=(text,), is_beyond=True),),
                    ),
                    Curve(
                        title=text,
                        unit=text,
                        x_name=text,
                        series=(Series(name=text, points=points), Series(name="other", points=points)),
                        limit=3.0,
                        limit_name=text,
                        marks=(Mark(x=2.0, name=text),),
                    ),
                ),
            ),
        ),
    )


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "wbr":
            return
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "path", "circle", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "circle", "rect"):
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def unescaped(text: str) -> str:
    """Markdown without its escapes, as a reader sees it."""
    plain = re.sub(r"\\([\\`*_{}\[\]~|$])", r"\1", text)
    return plain.replace("<br>", "\n").replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


@given(st.text(min_size=1, max_size=40) | st.just(HOSTILE))
def test_text_from_anywhere_adds_no_tag_and_no_attribute(text: str) -> None:
    page, plain = Page(html(everything(text))), Page(html(everything("plain")))

    assert page.tags == plain.tags
    assert [name for name, _ in page.attributes] == [name for name, _ in plain.attributes]
    assert page.open == []
    assert visible(text) in page.text


@given(st.text(max_size=40) | st.just(HOSTILE))
def test_text_from_anywhere_stays_text_in_markdown(text: str) -> None:
    written = markdown(everything(text))

    without_code = re.sub(r"^(`{3,})\n.*?\n\1$", "", written, flags=re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"<[^>]*>", without_code)) <= {"<br>", "<details>", "</details>", "<summary>", "</summary>"}
    tables = [line for line in without_code.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", re.sub(r"\\\\", "", line))) for line in tables} <= {2, 3, 4}
    assert visible(text) in unescaped(written)


def test_a_page_needs_nothing_from_anywhere_and_runs_nothing() -> None:
    page = Page(html(everything(HOSTILE)))

    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href", "style")]
    assert "url(" not in html(everything("")).partition("</style>")[0]
    (policy,) = [value for name, value in page.attributes if name == "content" and value and "default-src" in value]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")


def test_drawings_can_be_read_by_those_who_do_not_see_them() -> None:
    page = html(everything("some words"))

    for drawing in re.findall(r"<svg[^>]*>", page):
        assert 'aria-hidden="true"' in drawing or ('role="img"' in drawing and "aria-label=" in drawing)
    assert "<title>some words, some words</title><desc>" in page
    assert "lowest 1.25, highest 4" in page
    assert "some words: the numbers</summary>" in page


NUMBERS = document_of(
    Table(columns=(Column(name="a"), Column(name="b", is_number=True)), rows=(("x", "1.5"), ("y", "2.5"))),
    Bars(
        title="Time",
        name="actor",
        parts=("worked", "waited"),
        value_names=("worked",),
        bars=(Bar(name="learner", shares=(0.75, 0.25), values=("75.0%",)),),
    ),
    Curve(
        title="Loss",
        unit="nats",
        x_name="step",
        series=(Series(name="loss", points=(Point(x=1, y=0.125), Point(x=2, y=0.0625))),),
    ),
    Figures(figures=(Figure(name="gap", value="48% closed", note="since"),)),
)


@pytest.mark.parametrize("value", ["1.5", "2.5", "75.0%", "0.125", "0.0625", "48% closed", "learner", "waited", "Loss"])
def test_every_number_is_in_both(value: str) -> None:
    assert value in Page(html(NUMBERS)).text
    assert value in unescaped(markdown(NUMBERS))


def test_markdown_draws_with_characters() -> None:
    text = markdown(NUMBERS)

    assert "| learner | ██████████████████░░░░░░ | 75.0% |" in text
    assert "```\n█▁\n```" in text
    assert "| a | b |\n|---|---:|\n| x | 1.5 |" in text


@pytest.mark.parametrize("text", ["# no heading", "- no list", "1. no list", "+ no list", "= no heading"])
def test_a_paragraph_does_not_become_something_else(text: str) -> None:
    line = markdown(document_of(Text(text=text))).splitlines()[-1]

    assert not re.match(r"[#+\-=]|\d+[.)]", line)
    assert line.endswith(text[1:])


def test_a_fence_is_longer_than_what_it_holds() -> None:
    assert "````\na\n```\nb\n````" in markdown(document_of(Code(code="a\n```\nb")))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("two\r\nlines\r", "two\nlines\n"),
        ("a\tb\u00a0c", "a b c"),
        ("\x1b[2J\x00", "\\x1b[2J\\x00"),
        ("\u202etxt", "\\u202etxt"),
        ("\ud800", "\\ud800"),
        ("👩\u200d🔬", "👩\u200d🔬"),
        ("x" * 5000, "x" * 4000 + "… (1,000 more characters)"),
    ],
)
def test_what_cannot_be_seen_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_one_line_is_one() -> None:
    assert one_line(" a\n b\u2028c ") == "a b c"


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", re.findall(r":root \{[^}]*\}", CSS), ids=["light", "dark", "print"])
def test_text_and_lines_stand_out_in_every_scheme(scheme: str) -> None:
    color = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", scheme))

    for ground in (color["page"], color["soft"]):
        assert min(contrast(color[name], ground) for name in ("ink", "quiet", "warn")) >= 4.5
    assert min(contrast(color[name], color["page"]) for name in ("s0", "s1", "s2", "s3", "worked")) >= 3.0
