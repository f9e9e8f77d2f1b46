"""What ``--check`` prints: a line per finding, and what is left to do on the machine that runs the recipe."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from engine.check.look import Checked

_WORDS = {"ok": "ok   ", "wrong": "WRONG", "open": "open "}


def as_text(checked: Checked, *, again: str) -> str:
    """Args:
    again: the command that checks once more.
    """
    lines = [f"{_WORDS[finding.state]} {finding.subject}: {finding.text}" for finding in checked.findings]
    if checked.elsewhere:
        verdict = f"{len(checked.wrong)} wrong" if checked.wrong else "Nothing is wrong"
        lines += [
            "",
            f"{verdict}. This machine has no GPU and the recipe asks for one: what is open is answered by the machine",
            "that runs it. There:",
            *(f"    {command}" for command in _to_do(checked)),
            f"    {again}",
        ]
    return "\n".join(lines)


def as_document(checked: Checked) -> dict[str, Any]:
    """For ``--json``: ``ok`` is whether nothing is wrong, ``ready`` whether nothing is open either."""
    return {
        "ok": not checked.wrong,
        "ready": checked.inputs is not None,
        "elsewhere": checked.elsewhere,
        "findings": checked.findings,
    }


def _to_do(checked: Checked) -> Iterable[str]:
    """Each command once; the teacher at last, as it may need what the others bring, and stays running."""
    ordered = sorted(checked.findings, key=lambda finding: finding.subject == "teacher")
    return dict.fromkeys(finding.to_do for finding in ordered if finding.to_do is not None)
