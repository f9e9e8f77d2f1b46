"""A generator that makes no tokens and takes the time that making them would take: the simulation's side of
``engine.generation.protocol``, and which of its samplers gets a request. What a sampler does with it is
``engine.generation.replay_sampler``'s."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from engine.clock import Clock
from engine.generation.protocol import Aborted, Bucket, Generation, GenerationRequest, GeneratorStatistics
from engine.generation.replay_sampler import ReplayRequest, ReplaySampler, Update
from engine.recipe import ReplayConfig, WeightsConfig


class ReplayGenerator:
    """Satisfies ``engine.generation.protocol.Generator`` on virtual time, for any number of samplers at once.

    A request goes to the sampler with the most free slots; when none is free it waits, first come, first served.

    Args:
        costs: seconds, and the number of samplers.
        num_slots: of each sampler.
        length_of: tokens that a request is answered with; cut at its ``max_new_tokens``.
        version: the policy version that it begins with.
    """

    def __init__(
        self,
        *,
        costs: ReplayConfig,
        num_slots: int,
        length_of: Callable[[GenerationRequest], int],
        clock: Clock,
        version: int = 0,
    ) -> None:
        self._costs = costs
        self._num_slots = num_slots
        self._length_of = length_of
        self._clock = clock
        self._version = version
        self._waiting: deque[ReplayRequest] = deque()
        self._open: dict[int, ReplayRequest] = {}
        self.updates = [Update(version, WeightsConfig(), clock.now())]
        """Every version since the start."""
        self._samplers = [
            ReplaySampler(self, index, costs=costs, num_slots=num_slots, clock=clock)
            for index in range(costs.num_samplers)
        ]
        self._by_load: list[tuple[int, int]] = [(0, sampler.index) for sampler in self._samplers]
        """Heap of (sequences, sampler), at least one for each sampler that holds; others are passed over."""
        self._busy: dict[int, ReplaySampler] = {}
        """Those with work."""
        self._updating = asyncio.Lock()
        self._switched: asyncio.Future[None] | None = None
        self._num_switching = 0

    async def start(self) -> None:
        """Nothing to load."""

    async def generate(
        self, request: GenerationRequest, *, on_begin: Callable[[int], None] | None = None
    ) -> Generation:
        return (await self._answer([request], [on_begin]))[0]

    async def generate_wave(
        self, requests: Sequence[GenerationRequest], *, on_begin: Callable[[int, int], None] | None = None
    ) -> list[Generation]:
        return await self._answer(requests, [_for_request(on_begin, request.request_id) for request in requests])

    def abort(self, request_id: int) -> None:
        request = self._open.get(request_id)
        if request is not None:
            self._give_up(request)
            if not request.result.done():
                request.result.set_exception(Aborted(f"request {request_id} was aborted"))

    async def update_weights(
        self, version: int, buckets: Iterable[Bucket], *, config: WeightsConfig, digest: str | None = None
    ) -> None:
        """As the protocol says: every sampler takes the version in between two of its decode steps."""
        async with self._updating:
            await self._clock.sleep(self._costs.weights_push_s)
            # Samplers without work are told when they get some: of a thousand, few may have any.
            self.updates.append(Update(version, config, self._clock.now() + self._costs.weights_pause_s))
            self._switched = asyncio.get_running_loop().create_future()
            self._num_switching = len(self._busy)
            for sampler in list(self._busy.values()):
                sampler.switch()
            if self._num_switching:
                await self._switched
            await self._clock.sleep(self.updates[-1].idle_until_s - self._clock.now())
            self._version = version

    def capacity(self) -> int:
        return self._num_slots * len(self._samplers)

    def statistics(self) -> GeneratorStatistics:
        now = self._clock.now()
        return GeneratorStatistics(
            version=self._version,
            running=sum(sampler.num_running for sampler in self._samplers),
            waiting=len(self._waiting) + sum(len(sampler.entering) for sampler in self._samplers),
            num_slots=self.capacity(),
            tokens_total=sum(sampler.tokens_until(now) for sampler in self._samplers),
            decode_steps_total=sum(sampler.steps_until(now) for sampler in self._samplers),
            prefill_tokens_total=sum(sampler.prefill_tokens for sampler in self._samplers),
            busy_s=sum(sampler.busy_until(now) for sampler in self._samplers) / len(self._samplers),
            paused_s=sum(sampler.paused_until_now() for sampler in self._samplers) / len(self._samplers),
        )

    async def watch(self) -> None:
        await asyncio.Event().wait()

    async def stop(self) -> None:
        for request in list(self._open.values()):
            self.abort(request.request_id)

    async def _answer(
        self, requests: Sequence[GenerationRequest], on_begin: Sequence[Callable[[int], None] | None]
    ) -> list[Generation]:
        loop = asyncio.get_running_loop()
        opened = []
        for request, begin in zip(requests, on_begin, strict=True):
            num_tokens = max(1, min(self._length_of(request), request.params.max_new_tokens))
            opened.append(ReplayRequest(request, num_tokens, begin, loop.create_future()))
        for wanted in opened:
            self._open[wanted.request_id] = wanted
            self._place(wanted)
        try:
            return [await wanted.result for wanted in opened]
        finally:
            for wanted in opened:
                if self._open.get(wanted.request_id) is wanted:
                    self._give_up(wanted)

    def _place(self, request: ReplayRequest) -> None:
        # A slot that is free while others wait belongs to them: its sampler is taking in weights.
        sampler = None if self._waiting else self._least_loaded()
        if sampler is None:
            self._waiting.append(request)
        else:
            sampler.enter(request)

    def _least_loaded(self) -> ReplaySampler | None:
        """The sampler with the most free slots; None when all are full."""
        while self._by_load:
            load, index = self._by_load[0]
            sampler = self._samplers[index]
            if load != sampler.load:
                heapq.heappop(self._by_load)
                continue
            return sampler if load < self._num_slots else None
        return None

    def load_changed(self, sampler: ReplaySampler) -> None:
        heapq.heappush(self._by_load, (sampler.load, sampler.index))
        if len(self._by_load) > 4 * len(self._samplers) + 64:
            # Entries that no longer hold sink to the bottom and would stay there for the whole run.
            self._by_load = sorted((each.load, each.index) for each in self._samplers)
        if sampler.load:
            self._busy[sampler.index] = sampler
        else:
            self._busy.pop(sampler.index, None)

    def has_switched(self) -> None:
        self._num_switching -= 1
        if not self._num_switching and self._switched is not None and not self._switched.done():
            self._switched.set_result(None)

    def next_waiting(self) -> ReplayRequest | None:
        return self._waiting.popleft() if self._waiting else None

    def ended(self, request: ReplayRequest, generation: Generation) -> None:
        self._open.pop(request.request_id, None)
        if not request.result.done():
            request.result.set_result(generation)

    def _give_up(self, request: ReplayRequest) -> None:
        self._open.pop(request.request_id, None)
        if request.sampler is not None:
            request.sampler.leave(request)
        elif request in self._waiting:
            self._waiting.remove(request)


def _for_request(on_begin: Callable[[int, int], None] | None, request_id: int) -> Callable[[int], None] | None:
    return None if on_begin is None else lambda version: on_begin(request_id, version)
