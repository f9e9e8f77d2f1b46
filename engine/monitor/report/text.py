"""Text from anywhere, made safe to show: what cannot be seen is written out, and nothing is endless. Pure.

Escaping for Markdown is the business of its renderer.
"""

from __future__ import annotations

from html import escape

_JOINERS = "\u200c\u200d"
"""Persian words and composed emoji need them; they change nothing but how their neighbours join."""


def visible(text: str, *, limit: int = 4000) -> str:
    """``text`` with line breaks as they are, other white space as blanks, and control characters (those that reverse
    the direction of writing included) and lone surrogates in Python's notation; at most ``limit`` characters."""
    rest = len(text) - limit
    if rest > 0:
        text = text[:limit]
    if text.isprintable() and rest <= 0:
        return text
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    shown = "".join(c if c.isprintable() or c == "\n" or c in _JOINERS else _written_out(c) for c in lines)
    return f"{shown}… ({rest:,} more characters)" if rest > 0 else shown


def one_line(text: str, *, limit: int = 400) -> str:
    """As ``visible``, with line breaks and rows of blanks as one blank."""
    return visible(" ".join(text.split()), limit=limit)


def _written_out(character: str) -> str:
    return " " if character.isspace() else repr(character)[1:-1]


def safe(text: str) -> str:
    """``visible``, and escaped for HTML: as content and between quotes."""
    return escape(visible(text))
