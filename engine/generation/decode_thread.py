"""The thread that owns the model: reads messages between two decode steps, admits, exchanges weights, decodes.

It knows nothing of futures: what happened goes out through ``Listener``, whose methods run on the event loop.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from engine.generation.decoder import Decoder
from engine.generation.protocol import Generation, GenerationRequest
from engine.generation.staging import Staged, StagingArea
from engine.recipe import WeightsConfig


class Submission(NamedTuple):
    ticket: int
    """Unique in a thread's life; request ids may come again."""
    request: GenerationRequest


class Submit(NamedTuple):
    """Wait for slots, together and in this order."""

    submissions: Sequence[Submission]


class Abort(NamedTuple):
    """Forget a ticket, wherever it is; ended ones are ignored."""

    ticket: int


class Switch(NamedTuple):
    """Become ``version``."""

    version: int
    staged: Staged
    config: WeightsConfig


class Withdraw(NamedTuple):
    """Do not switch, if it has not happened."""


class Stop(NamedTuple):
    """End after the step under way."""


Message = Submit | Abort | Switch | Withdraw | Stop


class Counts(NamedTuple):
    """Of a thread's life."""

    running: int = 0
    tokens_total: int = 0
    decode_steps_total: int = 0
    prefill_tokens_total: int = 0
    busy_s: float = 0.0
    paused_s: float = 0.0


class Loaded(NamedTuple):
    """What ``load`` made."""

    decoder: Decoder
    staging: StagingArea
    vocab_size: int
    max_positions: int | None


class Listener(Protocol):
    """Called on the event loop, in the order in which things happened."""

    def on_loaded(self, loaded: Loaded) -> None: ...
    def on_begun(self, tickets: Sequence[int], version: int) -> None: ...
    def on_ended(self, ended: Sequence[tuple[int, Generation]]) -> None: ...
    def on_switched(self, version: int | None) -> None:
        """None: withdrawn."""
        ...

    def on_exit(self, error: BaseException | None) -> None:
        """The last call. None: as asked by ``Stop``."""
        ...


class DecodeThread(threading.Thread):
    """Consumes: Message from ``inbox``. Waits for: a message, and only while there is nothing to compute.

    Args:
        load: makes the decoder; called first, in this thread.
        post: hands a function and its arguments to the event loop; raises RuntimeError when the loop is closed.
        num_threads: CPU threads of every operation in this thread. torch keeps that number per thread; a thread that
            has not computed yet inherits what was set last anywhere, so every thread that computes sets its own.
    """

    def __init__(
        self,
        *,
        load: Callable[[], Loaded],
        listener: Listener,
        post: Callable[..., object],
        num_threads: int,
    ) -> None:
        # A daemon: a program that dies without stopping its generator still ends.
        super().__init__(name="decode", daemon=True)
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.counts = Counts()
        """Replaced as a whole after every round: any thread may read it."""
        self._load = load
        self._listener = listener
        self._post = post
        self._num_threads = num_threads
        self._waiting: deque[Submission] = deque()
        self._switch: Switch | None = None
        self._is_stopping = False
        self._busy_s = 0.0
        self._paused_s = 0.0

    def run(self) -> None:
        error: BaseException | None = None
        try:
            torch.set_num_threads(self._num_threads)
            loaded = self._load()
            self._post(self._listener.on_loaded, loaded)
            with torch.inference_mode():
                self._decode(loaded.decoder, loaded.staging)
        except BaseException as e:  # handed on, not handled: whoever waits for an answer gets it as the cause
            error = e
        try:
            self._post(self._listener.on_exit, error)
        except RuntimeError:
            return  # the event loop is closed: nobody is left who could be told

    def _decode(self, decoder: Decoder, staging: StagingArea) -> None:
        while True:
            self._read(decoder)
            if self._is_stopping:
                return
            began = time.perf_counter()
            if self._switch is not None and (self._switch.config.mode == "in_flight" or not decoder.num_running):
                self._exchange(self._switch, decoder, staging)
                self._switch = None
            if self._switch is None:
                self._admit(decoder)
            ended = decoder.step() if decoder.num_running else []
            self._busy_s += time.perf_counter() - began
            # Before the answers go out: whoever has got one sees it counted.
            self.counts = Counts(
                running=decoder.num_running,
                tokens_total=decoder.tokens_total,
                decode_steps_total=decoder.decode_steps_total,
                prefill_tokens_total=decoder.prefill_tokens_total,
                busy_s=self._busy_s,
                paused_s=self._paused_s,
            )
            if ended:
                self._post(self._listener.on_ended, ended)

    def _read(self, decoder: Decoder) -> None:
        """Take every message there is; with nothing to compute, wait for one."""
        is_idle = not (decoder.num_running or self._waiting or self._switch)
        while True:
            try:
                message = self.inbox.get(block=is_idle)
            except queue.Empty:
                return
            is_idle = False
            match message:
                case Submit(submissions):
                    self._waiting.extend(submissions)
                case Abort(ticket):
                    if not decoder.remove(ticket):
                        self._waiting = deque(s for s in self._waiting if s.ticket != ticket)
                case Switch():
                    assert self._switch is None, "two weight updates at a time"
                    self._switch = message
                case Withdraw():
                    if self._switch is not None:
                        self._switch = None
                        self._post(self._listener.on_switched, None)
                case Stop():
                    self._is_stopping = True

    def _exchange(self, switch: Switch, decoder: Decoder, staging: StagingArea) -> None:
        began = time.perf_counter()
        staging.exchange(switch.staged)
        self._paused_s += time.perf_counter() - began
        decoder.become(switch.version, recompute=switch.config.kv_cache == "recompute")
        self._post(self._listener.on_switched, switch.version)

    def _admit(self, decoder: Decoder) -> None:
        admitted = [self._waiting.popleft() for _ in range(min(len(self._waiting), decoder.num_free))]
        if admitted:
            self._post(self._listener.on_begun, [s.ticket for s in admitted], decoder.version)
            decoder.admit([(s.ticket, s.request) for s in admitted])
