"""Held-out measurements as a run keeps them: one line of ``evaluations.jsonl`` each. Decides how they are written and
read back; how they are made is decided in ``engine.actors.evaluator``."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from engine.errors import RunDirError
from engine.tracing import log


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    prompt: str
    answer: str
    kl: float
    """Mean forward KL over the answer's tokens, nats per token."""


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """One line of ``evaluations.jsonl``. All divergences in nats per token, means over all tokens."""

    version: int
    num_prompts: int
    num_tokens: int
    kl: float
    """Forward KL(teacher ‖ student) on the student's own answers."""
    reference_kl: float | None = None
    """The same on the reference answers (the teacher's own greedy ones, say)."""
    reference_nll: float | None = None
    """−log-probability of the reference answers under the student."""
    score: float | None = None
    """Mean of the recipe's scorer over the student's answers."""
    answers: tuple[Answer, ...] = ()
    """Greedy ones, to the first few prompts."""
    references: tuple[str, ...] = ()
    """Of the same prompts as ``answers``, when the file has them."""


def append_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Add one line; a line that a killed process left unfinished is ended first."""
    with path.open("ab+") as file:
        is_torn = False
        if file.tell():
            file.seek(-1, os.SEEK_END)
            is_torn = file.read(1) != b"\n"
        file.write((b"\n" if is_torn else b"") + msgspec.json.encode(evaluation) + b"\n")


def read_evaluations(path: Path) -> list[Evaluation]:
    """All evaluations of a run, oldest first. Lines that a killed process left unfinished are left out.

    Raises:
        RunDirError: the file is there and cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunDirError(
            f"{path}: cannot be read ({error.strerror}); move it away, or mend its permissions"
        ) from error
    evaluations = []
    for line in content.split(b"\n"):
        try:
            evaluations.append(msgspec.json.decode(line, type=Evaluation))
        except msgspec.DecodeError:
            if line:
                log.warning("eval.line_torn", path=str(path))
    return evaluations
