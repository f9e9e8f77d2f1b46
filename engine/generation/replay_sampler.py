"""One sampler on virtual time: what a decode step takes, who is in it, and what happens between two.

    n = sequences in slots     c(n) = decode_step_s + decode_slot_s · n, seconds per decode step

As in ``engine.generation.decode_thread`` prompts enter, answers end and weights change between two decode steps, never
within one. Between two changes of the set of active sequences nothing happens that is worth an event: k steps take
k · c(n). So an answer costs O(log n) here, however many tokens it has. Which sampler gets a request is decided in
``engine.generation.replay``.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from engine.clock import Clock
from engine.costs import decode_step_s, prefill_s
from engine.generation.blank import blank_logprobs, blank_tokens
from engine.generation.protocol import Generation, GenerationRequest
from engine.recipe import ReplayConfig, WeightsConfig
from engine.types import VersionSpan


class ReplayRequest:
    """One answer, wanted or under way."""

    __slots__ = (
        "begun_step",
        "first_switch",
        "is_given_up",
        "max_new_tokens",
        "num_tokens",
        "on_begin",
        "prompt",
        "request_id",
        "result",
        "sampler",
    )

    def __init__(
        self,
        request: GenerationRequest,
        num_tokens: int,
        on_begin: Callable[[int], None] | None,
        result: asyncio.Future[Generation],
    ) -> None:
        self.request_id = request.request_id
        self.prompt = request.token_ids
        self.num_tokens = num_tokens
        self.max_new_tokens = request.params.max_new_tokens
        self.on_begin = on_begin
        self.result = result
        self.sampler: ReplaySampler | None = None
        self.begun_step = 0
        self.first_switch = 0
        self.is_given_up = False


class Update(NamedTuple):
    """One version, on its way to all samplers."""

    version: int
    config: WeightsConfig
    idle_until_s: float
    """A sampler without work has taken it in by then."""


class Dispatcher(Protocol):
    """What a sampler asks and tells of all of them together."""

    @property
    def updates(self) -> Sequence[Update]:
        """Every version since the start."""
        ...

    def next_waiting(self) -> ReplayRequest | None:
        """The request that has waited longest, taken off the queue."""
        ...

    def load_changed(self, sampler: ReplaySampler) -> None: ...
    def ended(self, request: ReplayRequest, generation: Generation) -> None: ...
    def has_switched(self) -> None: ...


class ReplaySampler:
    """Its time is a row of stretches: in each the same sequences decode, step after step.

    ``_since`` is when the present stretch began, between two steps; ``_steps`` counts the steps before it.
    """

    def __init__(self, generator: Dispatcher, index: int, *, costs: ReplayConfig, num_slots: int, clock: Clock) -> None:
        self.index = index
        self.entering: list[ReplayRequest] = []
        """They have a slot and begin at the next end of a step."""
        self.prefill_tokens = 0
        self.paused_s = 0.0
        self._generator = generator
        self._costs = costs
        self._num_slots = num_slots
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._running: list[tuple[int, int, ReplayRequest]] = []
        """Heap of (step after which the answer ends, request id, request)."""
        self._num_given_up = 0
        self._since = 0.0
        self._decided_at = -math.inf
        """When it was last between two steps."""
        self._steps = 0
        self._step_s = 0.0
        self._busy_s = 0.0
        self._tokens = 0
        self._timer: asyncio.TimerHandle | None = None
        self._due = math.inf
        self._switches: list[tuple[int, int, bool]] = [(0, generator.updates[0].version, False)]
        """(steps before it, version, whether keys and values were kept) of every switch."""
        self._num_updates = 1
        """Of the generator's, those that it has taken in or is about to."""
        self._switch: Update | None = None
        self._is_paused = False

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def load(self) -> int:
        return len(self._running) + len(self.entering)

    def enter(self, request: ReplayRequest) -> None:
        """Take a request into a free slot."""
        if not self.load:
            self._catch_up()
        request.sampler = self
        self.entering.append(request)
        self._generator.load_changed(self)
        self._act_after_this_step()

    def leave(self, request: ReplayRequest) -> None:
        """Its answer is wanted by nobody any more."""
        if request in self.entering:
            self.entering.remove(request)
            self._generator.load_changed(self)
        else:
            # It goes with the end of the step under way.
            request.is_given_up = True
            self._num_given_up += 1
        self._act_after_this_step()

    def switch(self) -> None:
        """Take in the newest version at the end of the step under way."""
        assert self._switch is None, "two weight updates at a time"
        self._switch = self._generator.updates[-1]
        self._num_updates += 1
        # After another one that was taken in just now, a step comes first: an answer that began has a token of its
        # version.
        self._act_after_this_step(is_late=True)

    def _catch_up(self) -> None:
        """Take in what came while there was no work."""
        missed = self._generator.updates[self._num_updates :]
        if missed and self._switch is None:
            self._num_updates += len(missed)
            self.paused_s += len(missed) * self._costs.weights_pause_s
            self._busy_s += len(missed) * self._costs.weights_pause_s
            self._since = max(self._since, missed[-1].idle_until_s)
            self._switches.append((self._steps, missed[-1].version, False))

    def steps_until(self, now: float) -> int:
        """Decode steps that have ended."""
        return self._steps + self._steps_in_stretch(now)

    def tokens_until(self, now: float) -> int:
        return self._tokens + self._steps_in_stretch(now) * len(self._running)

    def busy_until(self, now: float) -> float:
        return self._busy_s + self._steps_in_stretch(now) * self._step_s + self._missed_s()

    def paused_until_now(self) -> float:
        return self.paused_s + self._missed_s()

    def _missed_s(self) -> float:
        """Pauses that nobody noticed, because there was no work."""
        missed = 0 if self.load else len(self._generator.updates) - self._num_updates
        return missed * self._costs.weights_pause_s

    def _steps_in_stretch(self, now: float) -> int:
        # A stretch may lie ahead: prefill and pause come before its first step.
        return int((now - self._since) / self._step_s + 1e-6) if self._running and now > self._since else 0

    def _act_after_this_step(self, *, is_late: bool = False) -> None:
        """``is_late``: what was decided just now, between two steps, was decided without it."""
        if self._is_paused:
            return
        now = self._clock.now()
        if not self._running:
            self._wake_at(max(now, self._since))
            return
        # Who comes while prompts enter waits for the step that follows. Rounding must not make a step that is just
        # ending into one that has just begun.
        is_between = now <= self._decided_at and not is_late
        num_steps = 0 if is_between else max(1, math.ceil((now - self._since) / self._step_s - 1e-6))
        self._wake_at(self._since + num_steps * self._step_s)

    def _wake_at(self, due: float) -> None:
        if due >= self._due:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._due = due
        self._timer = self._loop.call_at(due, self._wake)

    def _wake(self) -> None:
        """Between two steps: answers end, weights change, prompts enter, and the next stretch begins."""
        self._timer, at, self._due = None, self._due, math.inf
        self._decided_at = at
        if self._running and at > self._since:
            self._end_stretch(at)
        self._since = max(self._since, at)
        if self._switch is not None and (self._switch.config.mode == "in_flight" or not self._running):
            self._pause(self._switch.config)
            return
        if self._switch is None:
            self._admit()
        self._begin_stretch()

    def _end_stretch(self, at: float) -> None:
        num_steps = round((at - self._since) / self._step_s)
        running = self._running
        self._steps += num_steps
        self._tokens += num_steps * len(running)
        self._busy_s += num_steps * self._step_s
        self._since = at
        num_before = len(running)
        if self._num_given_up:
            self._num_given_up = 0
            running[:] = [entry for entry in running if not entry[2].is_given_up]
            heapq.heapify(running)
        while running and running[0][0] <= self._steps:
            request = heapq.heappop(running)[2]
            self._generator.ended(request, self._generation(request))
        if len(running) != num_before:
            self._generator.load_changed(self)

    def _admit(self) -> None:
        entering, running = self.entering, self._running
        while self.load < self._num_slots and (waiting := self._generator.next_waiting()) is not None:
            waiting.sampler = self
            entering.append(waiting)
        if not entering:
            return
        prompts: dict[int, int] = {}
        for request in entering:
            request.begun_step = self._steps
            request.first_switch = len(self._switches) - 1
            try:
                if request.on_begin is not None:
                    request.on_begin(self._switches[-1][1])
            except Exception as error:  # belongs to whoever waits for the answer
                if not request.result.done():
                    request.result.set_exception(error)
                continue
            heapq.heappush(running, (self._steps + request.num_tokens, request.request_id, request))
            # One object: samples of one prompt, which are computed once.
            prompts[id(request.prompt)] = len(request.prompt)
        entering.clear()
        num_tokens = sum(prompts.values())
        self.prefill_tokens += num_tokens
        self._compute(prefill_s(self._costs, num_tokens))
        self._generator.load_changed(self)

    def _begin_stretch(self) -> None:
        if self._running:
            self._step_s = decode_step_s(self._costs, len(self._running))
            self._wake_at(self._since + (self._running[0][0] - self._steps) * self._step_s)

    def _pause(self, config: WeightsConfig) -> None:
        self._is_paused = True
        pause_s = self._costs.weights_pause_s
        self.paused_s += pause_s
        self._compute(pause_s)
        if config.kv_cache == "recompute" and self._running and self._costs.prefill_token_s:
            num_tokens = sum(len(r.prompt) + self._steps - r.begun_step for _, _, r in self._running)
            self.prefill_tokens += num_tokens
            self._compute(prefill_s(self._costs, num_tokens))
        self._loop.call_at(self._since, self._resume)

    def _resume(self) -> None:
        assert self._switch is not None
        update, self._switch = self._switch, None
        self._is_paused = False
        self._decided_at = self._since
        self._switches.append((self._steps, update.version, update.config.kv_cache == "keep"))
        self._generator.has_switched()
        self._admit()
        self._begin_stretch()

    def _compute(self, seconds: float) -> None:
        self._busy_s += seconds
        self._since += seconds

    def _generation(self, request: ReplayRequest) -> Generation:
        num_tokens = request.num_tokens
        spans = []
        start, (_, version, stale_kv) = 0, self._switches[request.first_switch]
        stale_kv = False  # nothing of it was there to be kept
        for steps, next_version, kept in self._switches[request.first_switch + 1 :]:
            end = steps - request.begun_step
            spans.append(VersionSpan(version=version, start=start, end=end, stale_kv=stale_kv))
            start, version, stale_kv = end, next_version, kept
        spans.append(VersionSpan(version=version, start=start, end=num_tokens, stale_kv=stale_kv))
        blank = blank_logprobs(num_tokens)
        return Generation(
            request_id=request.request_id,
            token_ids=blank_tokens(num_tokens),
            logprobs=blank,
            sampling_logprobs=blank,
            spans=tuple(spans),
            finish_reason="length" if num_tokens >= request.max_new_tokens else "stop",
        )
