"""Ranks whose processes live on while what they are ranks of changes: each function runs in a world of its own size.

Megatron takes the whole of torch.distributed for its layout, and six seconds of CPU to be imported. So the processes
are kept, and the default process group is made anew for each call, which takes 50 ms.
"""

from __future__ import annotations

import importlib
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from tests.support.ranks import PATIENCE_S, Ranks


class Worlds(Ranks):
    """As ``Ranks``, but functions are called as ``function(*arguments)``, in a world of ``num_ranks`` ranks."""

    def outcomes(self, function: Callable[..., Any] | str, num_ranks: int, *arguments: Any) -> list[Any]:
        self._num_worlds = getattr(self, "_num_worlds", 0) + 1
        return super().outcomes(function, num_ranks, self._num_worlds, *arguments)

    @staticmethod
    def _serve(rank: int, num_ranks: int, store: str, pipe: Connection) -> None:
        torch.set_num_threads(1)
        while True:
            try:
                module, name, size, (world, *arguments) = pipe.recv()
            except (EOFError, ConnectionResetError):  # nobody can ask any more
                os._exit(0)  # nothing is kept here, and to take Megatron's modules down takes seconds
            outcome: Any
            try:
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{store}-{world}",
                    rank=rank,
                    world_size=size,
                    timeout=timedelta(seconds=PATIENCE_S),
                )
                outcome = getattr(importlib.import_module(module), name)(*arguments)
            except Exception as error:
                error.add_note("".join(traceback.format_exception(error)))
                outcome = error
            if dist.is_initialized():
                dist.destroy_process_group()
            pipe.send(outcome)
