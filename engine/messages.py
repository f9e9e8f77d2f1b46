"""Control messages to actors. Decides their fields; knows neither who sends nor who obeys.

They stay in the process that sends them today. They are a tagged union all the same, so that a message means the same
wherever it is read. Adding a field: append it with a default. Adding a message: append it to ``Control``. Changing or
removing either: raise ``PROTOCOL``.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

PROTOCOL = 2


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag=True):
    """Base of the tagged union ``Control``; the tag is the class name."""


class Drain(Message, frozen=True, kw_only=True):
    """Finish what is in flight, accept nothing new, then return from ``run``."""

    reason: str
    grace_s: float = 30.0
    """Seconds that the step under way may still take; then the run ends without it. For those who wait and those who
    tell: no actor is cancelled for it."""


Control: TypeAlias = Drain
"""All there are."""
