"""Control messages to actors, in memory and on the wire. Decides their fields; knows neither who sends nor who obeys.

Adding a field: append it with a default. Adding a message: append it to ``Control``. Changing or removing either: raise
``PROTOCOL`` and keep the old struct for one release.
"""

from __future__ import annotations

import msgspec

PROTOCOL = 1


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag=True):
    """Base of the tagged union ``Control``; the tag is the class name."""


class Drain(Message, frozen=True, kw_only=True):
    """Finish what is in flight, accept nothing new, then return from ``run``."""

    reason: str
    grace_s: float = 30.0
    """Who still runs after this is cancelled."""


class UseWeights(Message, frozen=True, kw_only=True):
    """Policy version ``version`` is ready: take it for what is begun from now on."""

    version: int
    digest: str | None = None
    """Hex digest over all tensors of the version; who holds another one under this number must not go on."""


class Save(Message, frozen=True, kw_only=True):
    """Write a checkpoint at the next point where the state is whole."""

    reason: str


Control = Drain | UseWeights | Save

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Control] = msgspec.msgpack.Decoder(Control)


def encode(message: Control) -> bytes:
    return _encoder.encode(message)


def decode(frame: bytes) -> Control:
    """Parse and check one frame.

    Raises:
        msgspec.DecodeError: not MessagePack, an unknown message, or a field that is missing or of the wrong type.
    """
    return _decoder.decode(frame)
