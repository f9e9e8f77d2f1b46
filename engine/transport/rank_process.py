"""Inside one rank: ``python -m engine.transport.rank_process PARENT WORK_FD STREAM_FD``, started by ``rank_group``.

It makes the object that it is told to make and calls its methods, one command after the other. It ends when the node
says so or is gone, however that went: the kernel kills it with the thread that started it, and an end of its sockets
says the same. Signals of the terminal and of a job's end are the node's to answer, so they are ignored here.
"""

# First of all the little that keeps a process from being left behind: torch takes seconds to import.
from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
DUMP_STACKS = signal.SIGUSR1
"""Writes every thread's stack to the log; sent to a rank that does not answer."""


def _live_no_longer_than(parent: int) -> None:
    # A stopped process dies of it, too, and one that hangs in C.
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it was gone before we asked
        os._exit(1)


if __name__ == "__main__":
    _live_no_longer_than(int(sys.argv[1]))
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(DUMP_STACKS, all_threads=True)

import socket  # noqa: E402
import threading  # noqa: E402
import traceback  # noqa: E402
import typing  # noqa: E402
from collections.abc import Callable, Generator, Iterator  # noqa: E402
from datetime import timedelta  # noqa: E402
from functools import partial  # noqa: E402
from typing import Any, NoReturn  # noqa: E402

import msgspec  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from engine.transport.rank_protocol import (  # noqa: E402
    Advance,
    Answer,
    Bye,
    Call,
    Command,
    Done,
    EndOfWire,
    Interface,
    Item,
    Raised,
    Setup,
    Wire,
    decode_arguments,
    load_named,
    read_plain,
    write_plain,
)
from engine.transport.shared_arrays import ArrayPlace, ArrayReader, SharedBuffers  # noqa: E402

_commands = msgspec.msgpack.Decoder(Command)


class _Rank:
    """The object, and how its methods are called."""

    def __init__(self, setup: Setup) -> None:
        self._rank = setup.rank
        self.device = torch.device("cpu" if setup.device == "cpu" else f"cuda:{setup.local_rank}")
        self._arrays = ArrayReader(setup.arrays_fd)
        self._buffers = SharedBuffers()
        self._interface = Interface(load_named(setup.interface))
        self._join(setup)
        factory = load_named(setup.factory)
        hints = typing.get_type_hints(factory)
        arguments = decode_arguments(hints, setup.arguments, self._read)
        if "buffers" in hints:
            arguments["buffers"] = self._buffers
        self._object: Any = factory(**arguments)
        self._open: Iterator[Any] | None = None

    def call(self, command: Call) -> Answer:
        arguments = self._interface.arguments(command.method, command.arguments, self._read)
        result = getattr(self._object, command.method)(**arguments)
        return Done(result=msgspec.Raw(msgspec.msgpack.encode(result, enc_hook=write_plain)))

    def open(self, command: Call) -> Answer:
        self.close()
        arguments = self._interface.arguments(command.method, command.arguments, read_plain)
        self._open = iter(getattr(self._object, command.method)(**arguments))
        return Done()

    def advance(self) -> Answer:
        assert self._open is not None, "the node opens an iterator first"
        for item in self._open:
            return Item(piece=self._buffers.piece(item) if self._rank == 0 else None)
        return Item(is_end=True)

    def close(self) -> Answer:
        opened, self._open = self._open, None
        if isinstance(opened, Generator):
            opened.close()
        return Done()

    def _read(self, kind: Any, value: Any) -> Any:
        if (typing.get_origin(kind) or kind) is np.ndarray:
            return self._arrays.read(msgspec.convert(value, ArrayPlace))
        return read_plain(kind, value)

    def _join(self, setup: Setup) -> None:
        timeout = timedelta(seconds=setup.collective_timeout_s)
        store = dist.TCPStore(  # type: ignore[attr-defined]
            setup.store_host, setup.store_port, is_master=False, timeout=timeout
        )
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(self.device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store,
            rank=setup.rank,
            world_size=setup.world_size,
            timeout=timeout,
        )


def _work(wire: Wire, rank: _Rank) -> NoReturn:
    """The lane of calls. Waits for: a command. Ends with the process."""
    while True:
        command = _receive(wire)
        if isinstance(command, Bye):
            _leave()
        assert isinstance(command, Call), command
        _answer(wire, partial(rank.call, command))


def _stream(wire: Wire, rank: _Rank) -> NoReturn:
    """The lane of iterators, in a thread of its own. Waits for: a command. Ends with the process."""
    torch.set_grad_enabled(False)  # a thread begins with it on
    if rank.device.type == "cuda":
        torch.cuda.set_device(rank.device)
    while True:
        command = _receive(wire)
        if isinstance(command, Call):
            _answer(wire, partial(rank.open, command))
        elif isinstance(command, Advance):
            _answer(wire, rank.advance)
        else:
            _answer(wire, rank.close)


def _receive(wire: Wire) -> Command:
    try:
        command: Command = _commands.decode(wire.receive())
    except EndOfWire:
        os._exit(0)
    return command


def _answer(wire: Wire, do: Callable[[], Answer]) -> None:
    answer: Answer
    try:
        answer = do()
    except Exception as error:
        traceback.print_exc()
        answer = raised(error)
    try:
        wire.send(answer)
    except EndOfWire:
        os._exit(0)


def raised(error: BaseException) -> Raised:
    return Raised(kind=type(error).__name__, text=str(error), traceback="".join(traceback.format_exception(error)))


def _leave() -> NoReturn:
    dist.destroy_process_group()
    # Not by way of the interpreter's end: libraries' own threads do not always survive that.
    sys.stderr.flush()
    os._exit(0)


def main(arguments: list[str]) -> NoReturn:
    work, stream = (Wire(socket.socket(fileno=int(fd))) for fd in arguments[1:3])
    setup = _receive(work)
    assert isinstance(setup, Setup), setup
    made: list[_Rank] = []

    def make() -> Answer:
        made.append(_Rank(setup))
        return Done()

    _answer(work, make)
    if not made:  # the node has been told why, and will end us
        while True:
            _receive(work)
    threading.Thread(target=_stream, args=(stream, made[0]), name="stream", daemon=True).start()
    _work(work, made[0])


if __name__ == "__main__":
    main(sys.argv[1:])
