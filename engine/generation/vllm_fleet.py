"""Several vLLM engines behind one generator: who gets which request, and what happens when one of them dies.

A version is packed once and every engine loads it; it is live when all that live hold it. It stays in memory until the
next one is, so that an engine that died is started again alone, with the present weights, while the others go on
answering and the learner hears nothing of it. Each engine is a ``VllmGenerator``; how one lives is its own business.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

import msgspec
import torch

from engine.actor import RestartPolicy, next_delay
from engine.errors import AnswerLost, GeneratorDied
from engine.generation.packer import PackedVersion, Packer
from engine.generation.protocol import Bucket, Generation, GenerationRequest, GeneratorStatistics
from engine.generation.vllm import VllmGenerator, to_its_end
from engine.generation.vllm_model import tensor_groups_of
from engine.generation.vllm_transfer import choose, make_segments
from engine.recipe import LoraConfig, SamplerConfig, StudentConfig, WeightsConfig
from engine.tracing import log

_RESTARTS = RestartPolicy(max_restarts=3, window_s=300.0, backoff_s=0.0)
"""Of one engine. To start one takes longer than any pause that would do it good."""
_NUM_SEGMENTS = 2
"""The present version, and the next."""


class _Current(NamedTuple):
    version: int
    packed: PackedVersion
    config: WeightsConfig


@dataclass(eq=False, slots=True)
class _Place:
    """One engine of the fleet."""

    number: int
    generator: VllmGenerator
    is_live: bool = True
    """Holds the present version and takes requests."""
    open: Counter[tuple[int, ...]] = field(default_factory=Counter)
    """Its open requests, by prompt."""
    num_open: int = 0
    failed_at: list[float] = field(default_factory=list)
    keeper: asyncio.Task[None] | None = None


class VllmFleet:
    """Satisfies ``engine.generation.protocol.Generator``; arguments as ``VllmGenerator``.

    Each request goes to the engine with the fewest open ones, or to one with room that has its prompt already. A wave
    is cut into as many parts as there are engines, in its order.
    """

    def __init__(
        self,
        *,
        config: SamplerConfig,
        student: StudentConfig,
        max_length: int | None = None,
        lora: LoraConfig | None = None,
        weights: WeightsConfig | None = None,
        weights_device: str = "cpu",
        version: int = 0,
    ) -> None:
        weights = weights or WeightsConfig()
        self._student = student
        self._lora = lora
        self._device = torch.device(weights_device)
        self._way = choose(weights.transfer, config, self._device)
        self._places = [
            _Place(
                number,
                VllmGenerator(
                    config=engine_config(config, number),
                    student=student,
                    max_length=max_length,
                    lora=lora,
                    weights=msgspec.structs.replace(weights, transfer=self._way),
                    weights_device=weights_device,
                    packs=False,
                    version=version,
                ),
            )
            for number in range(config.vllm.num_engines)
        ]
        self._num_slots = config.num_slots * config.vllm.data_parallel
        self._packer: Packer | None = None
        self._current: _Current | None = None
        self._of: dict[int, _Place] = {}
        """Where each open request is."""
        self._packing = asyncio.Lock()
        self._switching = asyncio.Lock()
        """No engine becomes live while versions change."""
        self._revived = asyncio.Event()
        self._starting = asyncio.Lock()
        self._ended: asyncio.Future[None]
        """Why the fleet cannot go on; made by ``start``."""
        self._asked = count()

    def __repr__(self) -> str:
        return f"<VllmFleet {self._student.path!r} of {len(self._places)}, {len(self._live())} live>"

    async def start(self) -> None:
        """As the protocol says. When one engine does not start, none is left."""
        groups = await asyncio.to_thread(tensor_groups_of, self._student, self._lora)
        try:
            for place in self._places:
                await self._start(place)
        except BaseException:
            await self._stop_engines()
            raise
        self._packer = Packer(make_segments(self._way, self._device, number=_NUM_SEGMENTS), groups)
        self._ended = asyncio.get_running_loop().create_future()
        for place in self._places:
            place.is_live, place.failed_at = True, []
            place.keeper = asyncio.create_task(self._keep(place), name=f"keep engine {place.number}")

    async def generate(
        self, request: GenerationRequest, *, on_begin: Callable[[int], None] | None = None
    ) -> Generation:
        """As the protocol says; waits while no engine is live.

        Raises:
            AnswerLost: the engine that it was in is gone.
        """
        await self._until(lambda: bool(self._live()))
        if request.request_id in self._of:
            raise ValueError(f"request {request.request_id} is open already; ids must be unique among the open ones")
        place = choose_place(self._live(), request.token_ids, num_slots=self._num_slots)
        place.open[request.token_ids] += 1
        place.num_open += 1
        self._of[request.request_id] = place
        try:
            return await place.generator.generate(request, on_begin=on_begin)
        except GeneratorDied as error:
            raise AnswerLost(f"engine {place.number} is gone: {error}") from error
        finally:
            place.num_open -= 1
            place.open[request.token_ids] -= 1
            if not place.open[request.token_ids]:
                del place.open[request.token_ids]
            del self._of[request.request_id]

    async def generate_wave(
        self, requests: Sequence[GenerationRequest], *, on_begin: Callable[[int, int], None] | None = None
    ) -> list[Generation]:
        """As the protocol says; waits until all engines are live, since what is in which is a function of the wave."""
        await self._until(lambda: len(self._live()) == len(self._places))
        size = -(-len(requests) // len(self._places))
        parts = [requests[start : start + size] for start in range(0, len(requests), max(1, size))]
        waves = [
            asyncio.ensure_future(place.generator.generate_wave(part, on_begin=on_begin))
            for place, part in zip(self._places, parts, strict=False)
        ]
        try:
            return [answer for answers in await asyncio.gather(*waves) for answer in answers]
        finally:
            for wave in waves:
                wave.cancel()

    def abort(self, request_id: int) -> None:
        if (place := self._of.get(request_id)) is not None:
            place.generator.abort(request_id)
            return
        for place in self._places:  # in a wave
            place.generator.abort(request_id)

    async def update_weights(
        self, version: int, buckets: Iterable[Bucket], *, config: WeightsConfig, digest: str | None = None
    ) -> None:
        """As the protocol says. An engine that dies on the way takes this version when it is started again."""
        packer = self._running()
        async with self._packing:
            packed = await packer.pack(buckets, digest=digest, is_wanted=lambda: self._packer is packer)
            if packed is None:
                raise GeneratorDied("the generator was stopped")
            try:
                # Half of the engines would be no version at all.
                await to_its_end(self._switch(packer, _Current(version, packed, config)))
            finally:
                if self._current is None or self._current.packed is not packed:
                    packer.give_back(packed)

    async def score(self, token_ids: tuple[int, ...]) -> list[float]:
        """As ``VllmGenerator.score``; another engine is asked each time."""
        await self._until(lambda: bool(self._live()))
        live = self._live()
        return await live[next(self._asked) % len(live)].generator.score(token_ids)

    def capacity(self) -> int:
        """Of the engines that are live."""
        return sum(place.generator.capacity() for place in self._live())

    def statistics(self) -> GeneratorStatistics:
        """Sums, means of times, and the oldest version."""
        each = [place.generator.statistics() for place in self._places]
        return GeneratorStatistics(
            version=min(
                (one.version for one, place in zip(each, self._places, strict=True) if place.is_live), default=0
            ),
            running=sum(one.running for one in each),
            waiting=sum(one.waiting for one in each),
            num_slots=sum(one.num_slots for one in each),
            tokens_total=sum(one.tokens_total for one in each),
            decode_steps_total=sum(one.decode_steps_total for one in each),
            prefill_tokens_total=sum(one.prefill_tokens_total for one in each),
            busy_s=sum(one.busy_s for one in each) / len(each),
            paused_s=sum(one.paused_s for one in each) / len(each),
        )

    async def watch(self) -> None:
        """As the protocol says: only when one engine dies again and again."""
        self._running()
        await asyncio.shield(self._ended)

    async def stop(self) -> None:
        packer, self._packer = self._packer, None
        if packer is None:
            return
        keepers = [place.keeper for place in self._places if place.keeper is not None]
        for keeper in keepers:
            keeper.cancel()
        await asyncio.wait(keepers)
        await self._stop_engines()
        self._current = None
        if self._ended.done():
            self._ended.exception()  # told, or of no interest any more
        self._revived.set()
        packer.close()

    async def _stop_engines(self) -> None:
        await asyncio.gather(*(place.generator.stop() for place in self._places))

    async def _switch(self, packer: Packer, new: _Current) -> None:
        async with self._switching:
            outcomes = await asyncio.gather(
                *(place.generator.take(new.version, new.packed, config=new.config) for place in self._live()),
                return_exceptions=True,
            )
            for outcome in outcomes:
                # Its keeper starts it again with what is current then.
                if isinstance(outcome, BaseException) and not isinstance(outcome, GeneratorDied):
                    raise outcome
            old, self._current = self._current, new
            if old is not None:
                packer.give_back(old.packed)

    async def _keep(self, place: _Place) -> None:
        """Waits for: the end of one engine. Then starts it again, unless that has happened too often."""
        try:
            while True:
                try:
                    await place.generator.watch()
                except GeneratorDied as error:
                    place.is_live = False
                    place.failed_at.append(time.monotonic())
                    log.warning("engine.lost", engine=place.number, error=str(error), num_open=place.num_open)
                    if next_delay(_RESTARTS, place.failed_at, place.failed_at[-1]) is None:
                        raise
                # One that does not start, or dies in it, is met again above.
                with suppress(GeneratorDied):
                    await self._restart(place)
        except Exception as error:
            if not self._ended.done():
                self._ended.set_exception(error)
            self._revived.set()

    async def _start(self, place: _Place) -> None:
        """One after the other: an engine inherits the environment of this process, which is set for each; and what the
        first one compiles the others find."""
        async with self._starting:
            await place.generator.start()

    async def _restart(self, place: _Place) -> None:
        began = time.monotonic()
        await place.generator.stop()
        await self._start(place)
        async with self._switching:
            if self._current is not None:
                await place.generator.take(self._current.version, self._current.packed, config=self._current.config)
            place.is_live = True
        self._revived.set()
        log.info("engine.restarted", engine=place.number, restart_s=time.monotonic() - began)

    async def _until(self, is_so: Callable[[], bool]) -> None:
        self._running()
        while not is_so():
            self._revived.clear()
            await self._revived.wait()
            self._running()

    def _live(self) -> list[_Place]:
        return [place for place in self._places if place.is_live]

    def _running(self) -> Packer:
        if self._packer is None:
            raise GeneratorDied("the generator is not running; call start() first")
        if self._ended.done():
            self._ended.result()
        return self._packer


def engine_config(config: SamplerConfig, number: int) -> SamplerConfig:
    """Of engine ``number`` alone: on the devices after those of the engines before it."""
    device = torch.device(config.device)
    vllm = config.vllm
    if device.type != "cpu":
        first = (device.index or 0) + number * vllm.tensor_parallel * vllm.data_parallel
        device = torch.device(device.type, first)
    return msgspec.structs.replace(config, device=str(device), vllm=msgspec.structs.replace(vllm, num_engines=1))


def choose_place(live: Sequence[_Place], prompt: tuple[int, ...], *, num_slots: int) -> _Place:
    """The one with the fewest open requests, unless one with a free slot computes this prompt already."""
    sharing = [place for place in live if prompt in place.open and place.num_open < num_slots]
    return min(sharing or live, key=lambda place: place.num_open)
