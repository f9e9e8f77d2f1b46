"""The processes of a rank group: how they are started, who notices that one is gone, and how all of them end.

Every process is started by one thread that lives as long as they do, because the kernel kills a rank when the *thread*
that started it ends. It also waits for deaths: when one rank dies unasked, the others, which may hang in a
collective with it, are killed at once.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from engine.transport.rank_process import DUMP_STACKS
from engine.transport.rank_protocol import Wire

_TAIL_LINES = 30


class RankProcess:
    """One of them, with the node's ends of its two lanes."""

    def __init__(self, rank: int, log: Path) -> None:
        self.rank = rank
        self.log = log
        self.work: Wire
        self.stream: Wire
        self.process: subprocess.Popen[bytes]

    def start(self, *, shared_fds: tuple[int, ...], environment: Mapping[str, str]) -> None:
        pairs = [socket.socketpair() for _ in range(2)]
        theirs = [end for _, end in pairs]
        try:
            with self.log.open("ab") as log:
                self.process = self._popen(theirs, shared_fds, environment, log)
        except BaseException:
            for ours, _ in pairs:
                ours.close()
            raise
        finally:
            for end in theirs:
                end.close()
        self.work, self.stream = (Wire(ours) for ours, _ in pairs)

    def _popen(
        self, ends: list[socket.socket], shared_fds: tuple[int, ...], environment: Mapping[str, str], log: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        numbers = [end.fileno() for end in ends]
        return subprocess.Popen(
            [sys.executable, "-m", "engine.transport.rank_process", str(os.getpid()), *map(str, numbers)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(*numbers, *shared_fds),
            env={**os.environ, **environment, "PYTHONPATH": _import_path(), "PYTHONUNBUFFERED": "1"},
            # Out of reach of the terminal's signals, and killed together with whatever it starts itself.
            process_group=0,
        )

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def dump_stacks(self) -> None:
        """Into the log. Does nothing to a process that is stopped."""
        if self.process.poll() is None:
            os.kill(self.process.pid, DUMP_STACKS)

    def is_stopped(self) -> bool:
        """By SIGSTOP or the like."""
        try:
            state = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2][:1]
        except OSError:
            return False
        return state in "Tt"

    def log_tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        return "".join(f"\n    {line}" for line in lines)

    def close(self) -> None:
        self.work.close()
        self.stream.close()


class RankProcesses:
    """All of a group. Made, started and closed by its owner; ``first_death`` is set by the thread that waits."""

    def __init__(self, num_ranks: int, *, folder: Path, name: str) -> None:
        self.ranks = [RankProcess(rank, folder / f"rank_{rank:03d}.log") for rank in range(num_ranks)]
        self.first_death: tuple[RankProcess, int] | None = None
        """Who died unasked, and its return code as ``subprocess`` has it."""
        self.has_died = threading.Event()
        self._name = name
        self._is_asked = False
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC)
        self._keeper: threading.Thread | None = None
        self._start_error: BaseException | None = None

    def start(self, *, shared_fds: tuple[int, ...], environment: Mapping[str, str]) -> None:
        """Return when all processes exist; they have made nothing yet."""
        has_started = threading.Event()
        self._keeper = threading.Thread(
            target=self._keep, args=(shared_fds, environment, has_started), name=f"{self._name} ranks", daemon=True
        )
        self._keeper.start()
        has_started.wait()
        if self._start_error is not None:
            raise self._start_error

    def kill(self) -> None:
        """All of them, at once; returns when they are gone. Idempotent."""
        self.end(grace_s=0.0)

    def end(self, *, grace_s: float) -> None:
        """Wait until all have ended, as they were asked to, and kill what has not after ``grace_s``."""
        if self._keeper is None or not self._keeper.is_alive():
            return
        self._is_asked = True
        if grace_s > 0.0:
            self._keeper.join(grace_s)
        os.write(self._wake_write, b"k")
        self._keeper.join()

    def close(self) -> None:
        """After ``end`` or ``kill``: give back what belonged to them."""
        for rank in self.ranks:
            if hasattr(rank, "work"):
                rank.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _keep(self, shared_fds: tuple[int, ...], environment: Mapping[str, str], has_started: threading.Event) -> None:
        """Waits for: a process to end. Ends when all have, or when it is woken, and then none is left."""
        started: list[RankProcess] = []
        try:
            for rank in self.ranks:
                rank.start(shared_fds=shared_fds, environment=environment)
                started.append(rank)
        except BaseException as error:
            self._start_error = error
        has_started.set()
        if self._start_error is None:
            self._wait_for_deaths(started)
        for rank in started:
            rank.kill()
        for rank in started:
            rank.process.wait()

    def _wait_for_deaths(self, ranks: list[RankProcess]) -> None:
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        alive: dict[int, RankProcess] = {}
        try:
            for rank in ranks:
                fd = os.pidfd_open(rank.process.pid)
                alive[fd] = rank
                poll.register(fd, select.POLLIN)
            while alive:
                for fd, _ in poll.poll():
                    if fd == self._wake_read:
                        return
                    rank = alive.pop(fd)
                    poll.unregister(fd)
                    os.close(fd)
                    code = rank.process.wait()
                    if not self._is_asked:
                        self.first_death = (rank, code)
                        self.has_died.set()
                        return
        finally:
            for fd in alive:
                os.close(fd)


def _import_path() -> str:
    """What this process imports, a rank can, too."""
    return os.pathsep.join(path for path in (os.getcwd(), *sys.path) if path)
