"""Reads the project's Markdown: code blocks with their place, commands, links. Decides nothing about what is right."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = tuple(
    path.relative_to(ROOT) for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")], key=str)
)

_COMMANDS = ("python -m ", "make ", ".venv/bin/")


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced or indented code block."""

    document: Path
    """Relative to the root."""
    line: int
    """Of its first line of code, counted from 1."""
    language: str
    """First word after the fence; empty when there is none."""
    notes: tuple[str, ...]
    """The other words after the fence: ``no-run`` on Python that is not a program."""
    code: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command line that a reader is told to type."""

    document: Path
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.document}:{self.line}: {shlex.join(self.words)}"


def blocks(document: Path, text: str) -> Iterator[Block]:
    """All code blocks, in order. An indented block follows an empty line and is indented by four spaces."""
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        line = lines[number]
        if line.startswith("```"):
            language, *notes = line.removeprefix("```").split() or [""]
            end = next((i for i in range(number + 1, len(lines)) if lines[i].startswith("```")), len(lines))
            code = lines[number + 1 : end]
            yield Block(
                document=document, line=number + 2, language=language, notes=tuple(notes), code="\n".join(code) + "\n"
            )
            number = end + 1
        elif line.startswith("    ") and number and not lines[number - 1].strip():
            end = next((i for i in range(number, len(lines)) if not lines[i].startswith("    ")), len(lines))
            code = [indented[4:] for indented in lines[number:end]]
            yield Block(document=document, line=number + 1, language="", notes=(), code="\n".join(code) + "\n")
            number = end
        else:
            number += 1


def commands(document: Path, text: str) -> Iterator[Command]:
    """What stands behind ``$ `` in a console block, what looks like one of our commands in a block of no language, and
    what does in `code` within the text. Comments and a trailing ``&`` are dropped, ``a && b`` is two commands."""
    without_blocks = text.splitlines()
    for block in blocks(document, text):
        for offset, line in enumerate(block.code.splitlines()):
            without_blocks[block.line - 1 + offset] = ""
            if block.language == "console" and line.startswith("$ "):
                yield from _split(document, block.line + offset, line.removeprefix("$ "))
            elif block.language == "" and line.startswith(_COMMANDS):
                yield from _split(document, block.line + offset, line)
    for number, line in enumerate(without_blocks, start=1):
        for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", line):
            if code.startswith(_COMMANDS) and ": ***" not in code:
                yield from _split(document, number, code)


def links(text: str) -> Iterator[str]:
    """Targets of ``[text](target)`` outside code blocks, anchors cut off, addresses left out."""
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if "://" not in target and not target.startswith("#"):
            yield target.partition("#")[0]


def _split(document: Path, line: int, text: str) -> Iterator[Command]:
    words = shlex.split(text, comments=True)
    while words:
        end = words.index("&&") if "&&" in words else len(words)
        part, words = words[:end], words[end + 1 :]
        yield Command(document=document, line=line, words=tuple(word for word in part if word != "&"))
