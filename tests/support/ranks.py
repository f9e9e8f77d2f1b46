"""Ranks of a process group on this machine: real processes under gloo, started once, that run functions by name."""

from __future__ import annotations

import importlib
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

PATIENCE_S = 120.0
"""For an answer of a rank; on a loaded machine the first one includes importing torch."""


class Ranks:
    """``num_ranks`` processes that wait for work. Leave the context to end them."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._is_broken = False
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        for rank in range(self.num_ranks):
            ours, theirs = context.Pipe()
            arguments = (rank, self.num_ranks, str(Path(self._folder.name) / "store"), theirs)
            process = context.Process(target=self._serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            if process.exitcode is None:
                process.kill()
                process.join()
        self._folder.cleanup()

    def run(self, function: Callable[..., Any] | str, num_ranks: int, *arguments: Any) -> list[Any]:
        """``function(group, *arguments)`` on the first ``num_ranks`` ranks at once; what each returns.

        Args:
            function: itself, or "module:function" where this process must not import the module.

        Raises:
            Exception: what the first of them raised, with the rank's traceback as a note.
        """
        outcomes = self.outcomes(function, num_ranks, *arguments)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        return outcomes

    def outcomes(self, function: Callable[..., Any] | str, num_ranks: int, *arguments: Any) -> list[Any]:
        """The same, with the exceptions in their places.

        Raises:
            TimeoutError: a rank does not answer. The pool is of no use afterwards.
        """
        if self._is_broken:
            raise TimeoutError("a rank did not answer before; this pool is of no use any more")
        if isinstance(function, str):
            module, _, name = function.partition(":")
        else:
            module, name = function.__module__, function.__qualname__
        for pipe in self._pipes[:num_ranks]:
            pipe.send((module, name, num_ranks, arguments))
        outcomes = []
        for rank, pipe in enumerate(self._pipes[:num_ranks]):
            if not pipe.poll(PATIENCE_S):
                self._is_broken = True
                raise TimeoutError(f"rank {rank} of {num_ranks} does not answer for {PATIENCE_S:.0f} s")
            outcomes.append(pipe.recv())
        return outcomes

    @staticmethod
    def _serve(rank: int, num_ranks: int, store: str, pipe: Connection) -> None:
        """What a process does; ends when the pipe does."""
        _serve(rank, num_ranks, store, pipe)


def _serve(rank: int, num_ranks: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=PATIENCE_S),
    )
    groups = [dist.new_group(list(range(size))) for size in range(1, num_ranks + 1)]
    while True:
        try:
            module, name, size, arguments = pipe.recv()
        except (EOFError, ConnectionResetError):  # nobody can ask any more
            break
        try:
            outcome = getattr(importlib.import_module(module), name)(groups[size - 1], *arguments)
        except Exception as error:
            error.add_note("".join(traceback.format_exception(error)))
            outcome = error
        pipe.send(outcome)
    dist.destroy_process_group()
