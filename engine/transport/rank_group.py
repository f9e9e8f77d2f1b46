"""A group of processes, *ranks*, that one owner calls as if they were one object: every rank gets the same call, with
arguments of its own, and inside it they meet in torch.distributed. Knows nothing of what they compute.

The order of calls is the same on all ranks, so they always meet in the same collective. Beside the calls, one iterator
at a time can be open: it is advanced while a call is under way.

A rank that dies, does not answer in time, or raises something unforeseen is the end of the group: all its processes are
killed, within seconds, and every further call says why. An error that the caller may expect (``TRAVELLING``) and that
leaves no rank waiting for another is raised as itself, and the group goes on.
"""

from __future__ import annotations

import select
import socket
import threading
import time
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch.distributed as dist
from torch import Tensor

from engine.errors import RanksLost
from engine.tracing import log
from engine.transport.rank_failures import expected_error, of_death, of_error, of_silence
from engine.transport.rank_processes import RankProcess, RankProcesses
from engine.transport.rank_protocol import (
    Advance,
    Answer,
    Bye,
    Call,
    Close,
    Done,
    EndOfWire,
    Interface,
    Item,
    Message,
    Raised,
    Setup,
    Wire,
    write_plain,
)
from engine.transport.shared_arrays import ArrayWriter, PieceReader

LOOPBACK = "127.0.0.1"

_GRACE_S = 3.0
"""From the first rank's error until the others must have answered: they may meet the same one, or wait for the first in
a collective that it will never reach."""
_BYE_S = 5.0
"""For a rank to leave by itself."""
_STACKS_S = 1.0
"""For a rank that hangs to write down where."""

_ONE_RANK = 0
"""The rank that iterators' items come from."""

_answers = msgspec.msgpack.Decoder(Answer)


class StreamItem(NamedTuple):
    """Views of memory that is written again when the item after the next is asked for."""

    names: Sequence[str]
    tensors: list[Tensor]


class RankGroup:
    """Start it, call it, close it. One thread at a time calls, and one at a time iterates.

    Args:
        name: for people.
        interface: the class whose methods are called; ranks import it, too.
        factory: "module:function" that makes a rank's object, called with ``arguments`` by name; with ``buffers``
            (``SharedBuffers``), too, if it has such a parameter.
        num_ranks: processes on this machine.
        device: "cpu" (gloo) or "cuda" (NCCL; rank r on device r).
        folder: where each rank's output is kept, in ``rank_NNN.log``.
        environment: of the ranks, beside this process' own.
        start_timeout_s: for the processes to come up and make their objects.
        call_timeout_s: for a call, or an item, unless the call says otherwise.
    """

    def __init__(
        self,
        *,
        name: str,
        interface: type,
        factory: str,
        arguments: Mapping[str, Any],
        num_ranks: int,
        folder: Path,
        device: str = "cpu",
        environment: Mapping[str, str] | None = None,
        start_timeout_s: float = 600.0,
        call_timeout_s: float = 600.0,
    ) -> None:
        self._name = name
        self._interface = Interface(interface)
        self._factory = factory
        self._arguments = arguments
        self._num_ranks = num_ranks
        self._folder = folder
        self._device = device
        # Gloo looks for an interface by the machine's name, which may lead to another machine, or nowhere.
        self._environment = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} | dict(environment or {})
        self._start_timeout_s = start_timeout_s
        self._call_timeout_s = call_timeout_s
        self._arrays = ArrayWriter()
        self._pieces = PieceReader()
        self._processes: RankProcesses | None = None
        self._store: object = None
        self._failure: RanksLost | None = None
        self._failing = threading.Lock()
        self._items: weakref.ref[Generator[StreamItem]] | None = None
        """The iterator that was opened last."""

    def __repr__(self) -> str:
        state = "not started" if self._processes is None else "lost" if self._failure is not None else "running"
        return f"<RankGroup {self._name!r} of {self._num_ranks} {state}>"

    @property
    def is_lost(self) -> bool:
        """Whether the next call would say so."""
        return self._failure is not None

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the ranks, in order."""
        return tuple(rank.process.pid for rank in self._ranks)

    def start(self) -> None:
        """Return when every rank has made its object.

        Raises:
            RanksLost: one could not, or not in time; none is left.
            One of TRAVELLING: the factory raised it; none is left.
        """
        assert self._processes is None, "the group is started already"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._processes = processes = RankProcesses(self._num_ranks, folder=self._folder, name=self._name)
        started = time.monotonic()
        try:
            port = self._open_store()
            processes.start(shared_fds=(self._arrays.fileno(),), environment=self._environment)
            (arguments,) = self._encoded([self._arguments])
            setups = [self._setup(rank, port, arguments) for rank in range(self._num_ranks)]
            self._exchange("work", setups, what="start", timeout_s=self._start_timeout_s)
        except BaseException:
            self.close()
            raise
        log.info(
            "ranks.started",
            group=self._name,
            num_ranks=self._num_ranks,
            pids=list(self.pids),
            start_s=time.monotonic() - started,
        )

    def call(
        self, method: str, arguments: Mapping[str, Any] | Sequence[Mapping[str, Any]], *, timeout_s: float | None = None
    ) -> list[Any]:
        """Call ``method`` on every rank; what each returned, in order.

        Args:
            arguments: by name; the same for all, or one per rank. Arrays in it are read by a rank where they are
                written once, and are the rank's only until it has answered.

        Raises:
            RanksLost: a rank died, hangs or failed, now or before.
            One of TRAVELLING: a rank raised it; the others are well.
        """
        for_each = [arguments] * self._num_ranks if isinstance(arguments, Mapping) else arguments
        calls = [Call(method=method, arguments=raw) for raw in self._encoded(for_each)]
        answers = self._exchange("work", calls, what=method, timeout_s=timeout_s or self._call_timeout_s)
        return [self._interface.result(method, answer.result) for answer in answers if isinstance(answer, Done)]

    def stream(self, method: str, **arguments: Any) -> Iterator[StreamItem]:
        """Call ``method``, which returns an iterator, and give rank 0's items; the next one is made meanwhile.

        Closing it early closes the ranks' iterators; so does the next ``stream``. Errors as of ``call``.
        """
        # Whoever gave one up in an exception may still hold it, and its last answer waits in the lane.
        if self._items is not None and (earlier := self._items()) is not None:
            earlier.close()
        items = self._stream(method, arguments)
        self._items = weakref.ref(items)
        return items

    def _stream(self, method: str, arguments: Mapping[str, Any]) -> Generator[StreamItem]:
        raw = msgspec.Raw(msgspec.msgpack.encode(arguments, enc_hook=write_plain))
        timeout_s = self._call_timeout_s
        self._exchange(
            "stream", [Call(method=method, arguments=raw)] * self._num_ranks, what=method, timeout_s=timeout_s
        )
        advance: list[Message] = [Advance()] * self._num_ranks
        is_owed = False
        try:
            item = self._item(self._exchange("stream", advance, what=method, timeout_s=timeout_s))
            while item is not None:
                self._send("stream", advance, method, timeout_s)
                is_owed = True
                yield item
                is_owed = False
                item = self._item(self._gather("stream", method, timeout_s))
        finally:
            if self._failure is None and not self._is_closed:
                if is_owed:
                    # Looked at though nobody wants it: it may say where a buffer is, which is said once.
                    self._item(self._gather("stream", method, timeout_s))
                self._exchange("stream", [Close()] * self._num_ranks, what=method, timeout_s=timeout_s)

    def close(self) -> None:
        """End all processes. Idempotent; raises nothing of the ranks."""
        processes, self._processes = self._processes, None
        if processes is None:
            return
        if self._failure is None:
            for rank in processes.ranks:
                if hasattr(rank, "work"):
                    try:
                        rank.work.send(Bye(), timeout_s=_GRACE_S)
                    except (EndOfWire, TimeoutError):
                        continue  # killed below
        processes.end(grace_s=_BYE_S if self._failure is None else 0.0)
        processes.close()
        self._arrays.close()
        self._pieces.forget()
        self._store = None

    # The way there and back.

    def _exchange(self, lane: str, messages: Sequence[Message], *, what: str, timeout_s: float) -> list[Answer]:
        deadline = time.monotonic() + timeout_s
        self._send(lane, messages, what, timeout_s)
        return self._gather(lane, what, max(deadline - time.monotonic(), 0.0), told_s=timeout_s)

    def _send(self, lane: str, messages: Sequence[Message], what: str, timeout_s: float) -> None:
        if self._failure is not None:
            raise RanksLost(str(self._failure))
        for rank, message in zip(self._ranks, messages, strict=True):
            wire: Wire = getattr(rank, lane)
            try:
                wire.send(message, timeout_s=timeout_s)
            except EndOfWire:
                raise self._lost_by_death(what) from None
            except TimeoutError:
                raise self._lost_by_silence([rank], what, timeout_s) from None

    def _gather(self, lane: str, what: str, timeout_s: float, *, told_s: float | None = None) -> list[Answer]:
        """The answer of every rank.

        Raises:
            RanksLost, or one of TRAVELLING: as ``call`` says.
        """
        if self._failure is not None:
            raise RanksLost(str(self._failure))
        deadline = time.monotonic() + timeout_s
        told_s = timeout_s if told_s is None else told_s
        answers: dict[int, Answer] = {}
        first_error: tuple[RankProcess, Raised] | None = None
        waiting = {getattr(rank, lane).fileno(): rank for rank in self._ranks}
        while waiting:
            ready = _readable(list(waiting), max(deadline - time.monotonic(), 0.0))
            if not ready:
                silent = list(waiting.values())
                if first_error is None:
                    raise self._lost_by_silence(silent, what, told_s)
                raise self._lost_by_error(*first_error, what)
            for fd in ready:
                rank = waiting[fd]
                try:
                    answer = _answers.decode(getattr(rank, lane).receive(timeout_s=_GRACE_S))
                except (EndOfWire, TimeoutError):
                    raise self._lost_by_death(what) from None
                del waiting[fd]
                answers[rank.rank] = answer
                if isinstance(answer, Raised) and first_error is None:
                    first_error = (rank, answer)
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        if first_error is not None:
            raise self._error_of_all(answers, what)
        return [answers[rank.rank] for rank in self._ranks]

    def _item(self, answers: Sequence[Answer]) -> StreamItem | None:
        items = [answer for answer in answers if isinstance(answer, Item)]
        ends = {item.is_end for item in items}
        if len(ends) > 1:
            raise self._lose("its ranks' iterators have different numbers of items; they must be advanced alike")
        piece = items[_ONE_RANK].piece
        return None if piece is None else StreamItem(piece.names, self._pieces.tensors(piece))

    # How it ends.

    def _error_of_all(self, answers: Mapping[int, Answer], what: str) -> Exception:
        """Every rank has answered, at least one of them with an error: none hangs."""
        errors = [(rank, answer) for rank in self._ranks if isinstance(answer := answers[rank.rank], Raised)]
        for rank, raised in errors:
            if expected_error(rank, raised) is None:
                return self._lost_by_error(rank, raised, what)
        expected = expected_error(*errors[0])
        assert expected is not None
        return expected

    def _lost_by_error(self, rank: RankProcess, raised: Raised, what: str) -> Exception:
        lost = self._lose(of_error(rank, raised, what=what, num_ranks=self._num_ranks))
        expected = expected_error(rank, raised)
        # A rank that was killed makes its peers fail: the death is the cause, and was reported in its stead.
        return expected if expected is not None and self._death() is None else lost

    def _lost_by_silence(self, silent: Sequence[RankProcess], what: str, timeout_s: float) -> RanksLost:
        stopped = [rank for rank in silent if rank.is_stopped()]
        if not stopped:
            for rank in silent:
                rank.dump_stacks()
            if self._processes is not None:  # a death meanwhile ends the wait
                self._processes.has_died.wait(_STACKS_S)
        why = of_silence(
            stopped or silent,
            are_stopped=bool(stopped),
            what=what,
            timeout_s=timeout_s,
            num_ranks=self._num_ranks,
            folder=self._folder,
        )
        return self._lose(why)

    def _lost_by_death(self, what: str) -> RanksLost:
        if (processes := self._processes) is not None:
            # The keeper sees it as soon as the sockets do, give or take the time to be scheduled.
            processes.has_died.wait(_GRACE_S)
        return self._lose(f"a rank left in {what}")

    def _death(self) -> tuple[RankProcess, int] | None:
        return None if self._processes is None else self._processes.first_death

    def _lose(self, why: str) -> RanksLost:
        """Kill all ranks. The reason is what was found first, and a rank's death comes before what it caused."""
        with self._failing:
            if self._failure is not None:
                return self._failure
            if self._processes is None:
                return RanksLost(f"the ranks of {self._name} were stopped meanwhile")
            if (death := self._death()) is not None:
                why = of_death(*death, num_ranks=self._num_ranks)
            self._failure = RanksLost(why)
            self._processes.kill()
            log.error("ranks.lost", group=self._name, cause=why.partition("\n")[0])
            return self._failure

    # Small things.

    @property
    def _ranks(self) -> list[RankProcess]:
        if self._processes is None:
            raise RuntimeError(f"the ranks of {self._name} are not started, or were closed")
        return self._processes.ranks

    @property
    def _is_closed(self) -> bool:
        return self._processes is None

    def _encoded(self, arguments: Sequence[Mapping[str, Any]]) -> list[msgspec.Raw]:
        """Ready to be sent: the arrays are written. What is the same object for several ranks is encoded once."""
        raws: dict[int, msgspec.Raw] = {}
        try:
            for one in arguments:
                if id(one) not in raws:
                    raws[id(one)] = msgspec.Raw(msgspec.msgpack.encode(one, enc_hook=self._write))
            self._arrays.write()
        finally:
            self._arrays.forget()
        return [raws[id(one)] for one in arguments]

    def _write(self, value: Any) -> Any:
        return self._arrays.place(value) if isinstance(value, np.ndarray) else write_plain(value)

    def _open_store(self) -> int:
        """Start the store where the ranks meet; its port. Ours alone to listen: torch would on all addresses."""
        listener = socket.create_server((LOOPBACK, 0))
        port: int = listener.getsockname()[1]
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            LOOPBACK,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=self._start_timeout_s),
            master_listen_fd=listener.detach(),
        )
        return port

    def _setup(self, rank: int, port: int, arguments: msgspec.Raw) -> Setup:
        return Setup(
            rank=rank,
            world_size=self._num_ranks,
            local_rank=rank,
            store_host=LOOPBACK,
            store_port=port,
            device=self._device,
            # The node gives up first, and knows who hangs.
            collective_timeout_s=max(self._call_timeout_s, self._start_timeout_s) + 60.0,
            arrays_fd=self._arrays.fileno(),
            interface=self._interface.name,
            factory=self._factory,
            arguments=arguments,
        )


def _readable(fds: Sequence[int], timeout_s: float) -> list[int]:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll(timeout_s * 1000.0)]
