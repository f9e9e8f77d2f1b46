"""What a node and its ranks say to each other: msgspec messages over a Unix socket, one length-prefixed frame each.

Nothing is unpickled. What methods are called with and return is msgspec's too, by the type hints of the interface that
both sides import; arrays stay in shared memory (``engine.transport.shared_arrays``), and only their places travel.

A rank has two *lanes*, a socket and a thread each: in one the interface's methods are called, in the other those that
return an iterator are called and advanced. A lane does one thing at a time and answers everything once, in order.
"""

from __future__ import annotations

import importlib
import inspect
import socket
import struct
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import CheckpointError, DataError, ModelError, NonFiniteError, RecipeError, RunDirError
from engine.transport.shared_arrays import Piece

TRAVELLING: tuple[type[Exception], ...] = (
    CheckpointError,
    DataError,
    ModelError,
    NonFiniteError,
    RecipeError,
    RunDirError,
    ValueError,
)
"""Errors that a caller may expect: they leave the rank as they are, with its traceback as a note."""

_HEADER = struct.Struct("<I")


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag=True):
    """Base of what travels; the tag is the class name."""


class Setup(Message, frozen=True, kw_only=True):
    """The first message to a rank: who it is, whom it meets, and what it shall make. Answered by Done or Raised."""

    rank: int
    """In the whole group, which may have ranks on other nodes, too."""
    world_size: int
    local_rank: int
    """Also the index of its CUDA device."""
    store_host: str
    store_port: int
    device: str
    """"cpu" or "cuda"."""
    collective_timeout_s: float
    arrays_fd: int
    """Of the shared memory that arrays come in."""
    interface: str
    """"module:Class" with the methods that may be called."""
    factory: str
    """"module:function" that makes the object."""
    arguments: msgspec.Raw
    """Of the factory, by name."""


class Call(Message, frozen=True, kw_only=True):
    """Call a method. Answered by Done or Raised; of a method that returns an iterator, Done means that it is open."""

    method: str
    arguments: msgspec.Raw


class Advance(Message, frozen=True, kw_only=True):
    """Make the open iterator's next item. Answered by Item or Raised."""


class Close(Message, frozen=True, kw_only=True):
    """Close the open iterator, if there is one. Answered by Done or Raised."""


class Bye(Message, frozen=True, kw_only=True):
    """End the process. Not answered."""


class Done(Message, frozen=True, kw_only=True):
    result: msgspec.Raw = msgspec.Raw(b"\xc0")
    """None, in msgpack."""


class Item(Message, frozen=True, kw_only=True):
    is_end: bool = False
    """There was none: the iterator has ended."""
    piece: Piece | None = None
    """None: at the end, and on ranks whose items are ignored."""


class Raised(Message, frozen=True, kw_only=True):
    kind: str
    """Class of the error."""
    text: str
    traceback: str


Command = Setup | Call | Advance | Close | Bye
Answer = Done | Item | Raised


class EndOfWire(Exception):
    """The other side is gone."""


class Wire:
    """One end of a socket that messages travel on. One thread at a time writes to it, and one reads."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._received = bytearray()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message, *, timeout_s: float | None = None) -> None:
        """Write one message.

        Raises:
            EndOfWire: the other side is gone.
            TimeoutError: the other side does not read.
        """
        body = msgspec.msgpack.encode(message)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.sendall(_HEADER.pack(len(body)) + body)
        except TimeoutError:
            raise
        except OSError as error:
            raise EndOfWire from error

    def receive(self, *, timeout_s: float | None = None) -> bytes:
        """Read one message; what has come of it stays if the rest does not come in time.

        Raises:
            EndOfWire: the other side is gone.
            TimeoutError: it did not come in ``timeout_s`` seconds.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while (frame := self._take_frame()) is None:
            self._socket.settimeout(None if deadline is None else max(deadline - time.monotonic(), 1e-3))
            try:
                some = self._socket.recv(1 << 20)
            except TimeoutError:
                raise
            except OSError as error:
                raise EndOfWire from error
            if not some:
                raise EndOfWire
            self._received += some
        return frame

    def close(self) -> None:
        self._socket.close()

    def _take_frame(self) -> bytes | None:
        if len(self._received) < _HEADER.size:
            return None
        (length,) = _HEADER.unpack_from(self._received)
        end = _HEADER.size + length
        if len(self._received) < end:
            return None
        frame = bytes(self._received[_HEADER.size : end])
        del self._received[:end]
        return frame


class Interface:
    """The public methods of a class, and how their arguments and results are read."""

    def __init__(self, kind: type) -> None:
        self.name = f"{kind.__module__}:{kind.__qualname__}"
        self._hints = {
            name: typing.get_type_hints(member)
            for name, member in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(self._hints)

    def is_stream(self, method: str) -> bool:
        """Whether it returns an iterator."""
        return typing.get_origin(self._hints[method].get("return")) is Iterator

    def arguments(self, method: str, raw: msgspec.Raw, read: Callable[[Any, Any], Any]) -> dict[str, Any]:
        return decode_arguments(self._hints[method], raw, read)

    def result(self, method: str, raw: msgspec.Raw) -> Any:
        return msgspec.msgpack.decode(raw, type=self._hints[method].get("return", Any), dec_hook=read_plain)


def decode_arguments(hints: dict[str, Any], raw: msgspec.Raw, read: Callable[[Any, Any], Any]) -> dict[str, Any]:
    """By name, each as its hint says; ``read`` makes what msgspec does not know."""
    named = msgspec.msgpack.decode(raw, type=dict[str, msgspec.Raw])
    return {
        name: msgspec.msgpack.decode(value, type=hints.get(name, Any), dec_hook=read) for name, value in named.items()
    }


def write_plain(value: Any) -> Any:
    """msgspec's hook for what it does not know."""
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"{type(value).__name__} cannot travel between a node and its ranks")


def read_plain(kind: Any, value: Any) -> Any:
    """The reverse of ``write_plain``."""
    if kind is Path:
        return Path(value)
    raise NotImplementedError(f"{kind} cannot travel between a node and its ranks")


def load_named(name: str) -> Any:
    """ "module:name" → what it names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
