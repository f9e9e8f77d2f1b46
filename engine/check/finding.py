"""What becomes of a look: fine, wrong, or open until the machine that runs the recipe is asked. Looks at nothing.

A recipe for GPUs is checked on laptops, too, before anybody has paid for a GPU. A machine without a single one is not
the machine that will run it: what is not there is *open*, with the command that brings it, and what is there is checked
and refused as everywhere. A recipe for the CPU runs anywhere, so there a missing file is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, TypeVar

import msgspec

from engine.errors import Absent, EngineError, UserError

State = Literal["ok", "wrong", "open"]
Value = TypeVar("Value")


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One check and how it ended."""

    subject: str
    state: State
    text: str
    to_do: str | None = None
    """Of what is open: the command that brings it, where one does."""


def is_elsewhere(devices: Iterable[str], *, num_gpus: int) -> bool:
    """Whether another machine than this one will run what computes on ``devices``.

    Args:
        devices: as recipes name them: "cpu", "cuda", "cuda:3".
        num_gpus: CUDA devices of this machine. With one of eight it is the right kind of machine, and too small.
    """
    return num_gpus == 0 and any(device.partition(":")[0] == "cuda" for device in devices)


def state_of(error: EngineError | None, *, elsewhere: bool, of_machine: bool) -> State:
    """How a look that ended with ``error`` counts.

    Args:
        elsewhere: this is not the machine that will run the recipe.
        of_machine: what was looked at belongs to a machine whatever it holds: a port, a login.
    """
    if error is None:
        return "ok"
    return "open" if elsewhere and (of_machine or isinstance(error, Absent)) else "wrong"


class Findings:
    """Collects what is found, in the order of looking; one failure does not keep the next look from being taken."""

    def __init__(self, *, elsewhere: bool) -> None:
        self.elsewhere = elsewhere
        self.all: list[Finding] = []

    def look(self, subject: str, look: Callable[[], tuple[str, Value]], *, of_machine: bool = False) -> Value | None:
        """What ``look`` returned beside its line of text; None when it raised a ``UserError``, which is noted."""
        try:
            text, value = look()
        except UserError as error:
            self.failed(subject, error, of_machine=of_machine)
            return None
        self.found(subject, text)
        return value

    def found(self, subject: str, text: str) -> None:
        self.all.append(Finding(subject=subject, state="ok", text=text))

    def failed(self, subject: str, error: EngineError, *, of_machine: bool = False) -> None:
        if state_of(error, elsewhere=self.elsewhere, of_machine=of_machine) == "wrong":
            self.all.append(Finding(subject=subject, state="wrong", text=str(error)))
        elif isinstance(error, Absent):
            self.leave_open(subject, error.what, to_do=error.bring)
        else:
            self.leave_open(subject, str(error))

    def leave_open(self, subject: str, text: str, *, to_do: str | None = None) -> None:
        """Note what only the machine that runs the recipe can answer."""
        self.all.append(Finding(subject=subject, state="open", text=text, to_do=to_do))
