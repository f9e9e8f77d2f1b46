"""The generator on vLLM: real continuous batching in an engine process, weights exchanged while requests are open.

This file is the side that the event loop sees: who waits, who is in the engine, what is given up, when weights change.
``vllm_engine`` starts the engine and speaks to it, ``packer`` and ``vllm_transfer`` carry weights, ``vllm_inside`` runs
in its processes. Several engines beside each other are ``vllm_fleet``'s business.

Requests wait here, first come, first served, and enter the engine while it has a free slot and room for keys and
values: what waits in the engine instead could not be held back when weights change.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.errors import GeneratorDied
from engine.generation.packer import PackedVersion, Packer
from engine.generation.protocol import Aborted, Bucket, Generation, GenerationRequest, GeneratorStatistics
from engine.generation.requests import check_requests, settled
from engine.generation.vllm_engine import StepCounts, VllmEngine
from engine.generation.vllm_model import tensor_groups_of
from engine.generation.vllm_transfer import Transfer, choose, make_segments, make_transfer
from engine.recipe import LoraConfig, SamplerConfig, StudentConfig, WeightsConfig
from engine.types import VersionSpan


@dataclass(eq=False, slots=True)
class _Open:
    """A request between its call and its end."""

    request: GenerationRequest
    on_begin: Callable[[int], None] | None
    place: asyncio.Future[None]
    """Done when it has a place in the engine."""
    task: asyncio.Task[Generation] | None = None
    is_inside: bool = False
    reason: Exception | None = None
    """Why it was given up, if it was."""


@dataclass(slots=True)
class _Counts:
    """Of the life of the generator object."""

    tokens: int = 0
    steps: int = 0
    prefill_tokens: int = 0
    busy_s: float = 0.0
    paused_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Switch:
    version: int
    kept_kv: bool


@dataclass(slots=True)
class _Life:
    """What belongs to one engine, from its start to its end."""

    engine: VllmEngine
    transfer: Transfer
    packer: Packer | None
    """None: versions come packed."""
    switches: list[_Switch] = field(default_factory=list)
    death: BaseException | None = None
    died: asyncio.Event = field(default_factory=asyncio.Event)
    watch: asyncio.Task[None] | None = None


class VllmGenerator:
    """Satisfies ``engine.generation.protocol.Generator``.

    Args:
        config: slots, device, dtype, threads, and the engine's own settings.
        student: the folder that ``start`` loads.
        max_length: tokens of prompt and answer together; None: the student's positions.
        lora: a version is an adapter of this kind, on the student in the folder; None: all weights.
        weights: how versions travel.
        weights_device: where the weights that are sent lie. On the one GPU of the engine they stay there.
        packs: ``update_weights`` packs what it is sent; False: only ``take`` is called, and memory is somebody else's.
        version: the policy version that this folder holds.

    Raises:
        RecipeError: weights cannot travel in that way between these devices.
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
        packs: bool = True,
        version: int = 0,
    ) -> None:
        self._config = config
        self._student = student
        self._max_length = config.vllm.max_length or max_length
        self._weights = weights or WeightsConfig()
        self._weights_device = torch.device(weights_device)
        self._way = choose(self._weights.transfer, config, self._weights_device)
        self._packs = packs
        self._lora = lora
        self._first_version = version
        self._version = version
        self._num_slots = config.num_slots * config.vllm.data_parallel
        self._life: _Life | None = None
        self._starting: asyncio.Task[_Life] | None = None
        self._open: dict[int, _Open] = {}
        self._waiting: deque[_Open] = deque()
        self._num_inside = 0
        self._num_stuck = 0
        """Requests that the engine has taken and cannot run."""
        self._is_held = False
        """Nothing may enter the engine: weights are about to change."""
        self._left = asyncio.Event()
        self._packing = asyncio.Lock()
        self._switching = asyncio.Lock()
        self._next_name = 0
        self._counts = _Counts()
        self._busy_since = 0.0
        """When the first of those inside entered."""

    def __repr__(self) -> str:
        state = "stopped" if self._life is None else "died" if self._is_dead(self._life) else "running"
        return f"<VllmGenerator {self._student.path!r} {state} version={self._version} open={len(self._open)}>"

    async def start(self) -> None:
        """As the protocol says. After ``stop`` it begins again, with the folder's weights and version."""
        if self._life is not None or self._starting is not None:
            raise RuntimeError("the generator is started already; stop it first")
        self._version = self._first_version
        self._num_inside = self._num_stuck = 0
        self._is_held = False
        self._starting = asyncio.create_task(self._begin_life(), name="start vLLM")
        try:
            self._life = life = await self._starting
        finally:
            self._starting = None
        life.watch = asyncio.create_task(self._watch(life), name="watch vLLM")

    async def generate(
        self, request: GenerationRequest, *, on_begin: Callable[[int], None] | None = None
    ) -> Generation:
        """As the protocol says. ``on_begin`` is called when the first token is there, with the version that it came
        from: until then vLLM may still put the request off."""
        self._check([request])
        entry = self._open_one(request, on_begin)
        self._waiting.append(entry)
        self._admit()
        return await self._result(entry)

    async def generate_wave(
        self, requests: Sequence[GenerationRequest], *, on_begin: Callable[[int, int], None] | None = None
    ) -> list[Generation]:
        """As the protocol says. Alone, the whole wave is handed to the engine while it stands still: which requests
        share a step is then its scheduler's choice, not that of two processes' timing."""
        self._check(requests)
        if self._open or not requests:
            return await _all([self.generate(one, on_begin=_of(on_begin, one.request_id)) for one in requests])
        async with self._standstill(clear_cache=True):
            self._check(requests)  # others may have come meanwhile
            entries = [self._open_one(one, _of(on_begin, one.request_id)) for one in requests]
            for entry in entries:
                self._enter(entry)
            # Each task hands its request over in its first turns, in this order.
            await asyncio.sleep(0)
        return await _all([self._result(entry) for entry in entries])

    def abort(self, request_id: int) -> None:
        entry = self._open.get(request_id)
        if entry is not None:
            self._give_up(entry, Aborted(f"request {request_id} was aborted"))

    async def update_weights(
        self, version: int, buckets: Iterable[Bucket], *, config: WeightsConfig, digest: str | None = None
    ) -> None:
        """As the protocol says. In order of calls; while one waits for its switch, the next is packed. Cancelled before
        generation stands still, it does not happen.

        Raises:
            ValueError: a name or shape that the model does not have, parameters that are missing, or a version below
                the present one. The present weights stay whole.
            WeightsMismatch: what came has another digest. The present weights stay whole.
            GeneratorDied: the engine is gone, or could not load what it was sent.
        """
        life = self._alive()
        assert life.packer is not None, "this one takes packed versions"
        async with self._packing:
            self._check_version(life, version)
            packed = await life.packer.pack(buckets, digest=digest, is_wanted=lambda: self._life is life)
        if packed is None:
            raise GeneratorDied("the generator was stopped")
        try:
            # Up to where it waits for its turn nothing else runs, so versions take turns as they were packed.
            await self.take(version, packed, config=config)
        finally:
            life.packer.give_back(packed)

    async def take(self, version: int, packed: PackedVersion, *, config: WeightsConfig) -> None:
        """As ``update_weights``, with what a ``Packer`` made. Returns or raises only when it is not read any more.

        Raises:
            ValueError: a version below the present one.
            GeneratorDied: the engine is gone, or could not load it.
        """
        life = self._alive()
        async with self._switching:
            self._check_version(life, version)
            await self._switch(life, version, packed, config)

    async def score(self, token_ids: tuple[int, ...]) -> list[float]:
        """Log-probability of each token but the first under the present weights, nats; beside what is in the slots.

        Raises:
            GeneratorDied: the engine is gone.
        """
        return await self._alive().engine.score(token_ids, name=self._name("score"))

    def capacity(self) -> int:
        """What runs, while the engine has no room for more keys and values."""
        return max(1, self._num_inside - self._num_stuck) if self._num_stuck else self._num_slots

    def statistics(self) -> GeneratorStatistics:
        """``waiting`` counts every open request that is not in the engine, or that the engine cannot run yet."""
        running = max(0, self._num_inside - self._num_stuck)
        busy_s = self._counts.busy_s
        if self._num_inside:
            busy_s += time.perf_counter() - self._busy_since
        return GeneratorStatistics(
            version=self._version,
            running=running,
            waiting=max(0, len(self._open) - running),
            num_slots=self._num_slots,
            tokens_total=self._counts.tokens,
            decode_steps_total=self._counts.steps,
            prefill_tokens_total=self._counts.prefill_tokens,
            busy_s=busy_s,
            paused_s=self._counts.paused_s,
        )

    async def watch(self) -> None:
        life = self._alive()
        await life.died.wait()
        raise self._dead(life)

    async def stop(self) -> None:
        """As the protocol says. A weight update under way ends with GeneratorDied."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait([self._starting])
        life, self._life = self._life, None
        if life is None:
            return
        for entry in list(self._open.values()):
            self._give_up(entry, Aborted(f"request {entry.request.request_id} was given up: the generator stops"))
        tasks: list[asyncio.Task[Any]] = [entry.task for entry in self._open.values() if entry.task is not None]
        life.died.set()
        if life.watch is not None:
            life.watch.cancel()
            tasks.append(life.watch)
        if tasks:
            await asyncio.wait(tasks)
        life.transfer.close()
        await life.engine.stop()
        if life.packer is not None:
            life.packer.close()

    # Requests.

    def _open_one(self, request: GenerationRequest, on_begin: Callable[[int], None] | None) -> _Open:
        life = self._alive()
        entry = _Open(request, on_begin, asyncio.get_running_loop().create_future())
        self._open[request.request_id] = entry
        entry.task = asyncio.create_task(self._sample(life, entry), name=f"sample {request.request_id}")
        # Not in the task itself: one that is cancelled before its first turn never runs.
        entry.task.add_done_callback(lambda _: self._close(entry))
        return entry

    def _close(self, entry: _Open) -> None:
        del self._open[entry.request.request_id]
        entry.place.cancel()
        if not entry.is_inside:
            return
        self._num_inside -= 1
        if self._num_inside == 0:
            self._num_stuck = 0
            self._counts.busy_s += time.perf_counter() - self._busy_since
        self._left.set()
        self._admit()

    async def _result(self, entry: _Open) -> Generation:
        assert entry.task is not None
        try:
            return await entry.task
        except asyncio.CancelledError:
            if entry.reason is not None and entry.task.cancelled():
                raise entry.reason from None
            raise

    async def _sample(self, life: _Life, entry: _Open) -> Generation:
        await entry.place
        version = self._version
        try:
            answer = await life.engine.answer(
                entry.request,
                name=self._name(str(entry.request.request_id)),
                on_first=lambda: None if entry.on_begin is None else entry.on_begin(self._version),
            )
        except GeneratorDied as error:
            self._die(life, error)
            raise
        return Generation(
            request_id=entry.request.request_id,
            token_ids=answer.token_ids,
            logprobs=answer.logprobs,
            sampling_logprobs=answer.sampling_logprobs,
            spans=tuple(
                VersionSpan(version=v, start=start, end=end, stale_kv=_is_stale(life.switches, since=version, upto=v))
                for v, start, end in answer.versions
            ),
            finish_reason=answer.finish_reason,
            top_ids=answer.top_ids,
        )

    def _admit(self) -> None:
        """Let in what has waited longest, as long as the engine will run it at once."""
        while self._waiting and not self._is_held and self._num_inside < self._num_slots and not self._num_stuck:
            entry = self._waiting.popleft()
            if not entry.place.done():
                self._enter(entry)

    def _enter(self, entry: _Open) -> None:
        if self._num_inside == 0:
            self._busy_since = time.perf_counter()
        self._num_inside += 1
        entry.is_inside = True
        entry.place.set_result(None)

    def _on_step(self, counts: StepCounts) -> None:
        if self._life is None:
            return  # the token that shows that the engine runs
        self._counts.steps += counts.num_tokens > 0
        self._counts.tokens += counts.num_tokens
        self._counts.prefill_tokens += counts.num_prefill_tokens
        self._num_stuck = min(counts.num_waiting, self._num_inside)
        self._admit()

    def _give_up(self, entry: _Open, reason: Exception) -> None:
        assert entry.task is not None
        if entry.reason is None and not entry.task.done():
            entry.reason = reason
            entry.task.cancel()

    def _check(self, requests: Sequence[GenerationRequest]) -> None:
        engine = self._alive().engine
        check_requests(requests, open_ids=self._open, max_length=engine.max_length, vocab_size=engine.vocab_size)

    def _name(self, kind: str) -> str:
        self._next_name += 1
        return f"{kind}-{self._next_name}"

    # Weights.

    async def _switch(self, life: _Life, version: int, packed: PackedVersion, config: WeightsConfig) -> None:
        """The new weights come between two steps of the engine; the caller holds the turn."""
        kept_kv = config.mode == "in_flight" and config.kv_cache == "keep"
        await to_its_end(self._bring(life, packed))
        self._is_held = True
        try:
            if config.mode == "drain":
                await self._until_empty(life)
            # Half a version cannot be taken back.
            await to_its_end(self._load(life, version, packed, kept_kv=kept_kv))
        finally:
            self._is_held = False
            self._admit()

    async def _bring(self, life: _Life, packed: PackedVersion) -> None:
        with self._fatal(life, "did not get"):
            await life.transfer.bring(life.engine, *packed)

    async def _load(self, life: _Life, version: int, packed: PackedVersion, *, kept_kv: bool) -> None:
        began = time.perf_counter()
        try:
            with self._fatal(life, f"could not load version {version}"):
                await life.engine.pause(clear_cache=not kept_kv)
                await life.transfer.load(life.engine, *packed, version=version)
                life.switches.append(_Switch(version, kept_kv))
                self._version = version
                await life.engine.resume()
        finally:
            self._counts.paused_s += time.perf_counter() - began

    @contextmanager
    def _fatal(self, life: _Life, what: str) -> Iterator[None]:
        """After a failure inside, the engine's weights, or what its workers expect next, are not whole any more."""
        try:
            yield
        except GeneratorDied as error:
            self._die(life, error)
            raise
        except Exception as error:
            died = GeneratorDied(f"vLLM {what}: {error}; its weights are not whole any more")
            self._die(life, died)
            raise died from error

    async def _until_empty(self, life: _Life) -> None:
        while self._num_inside:
            self._left.clear()
            await self._left.wait()
            self._same(life)

    @asynccontextmanager
    async def _standstill(self, *, clear_cache: bool) -> AsyncIterator[None]:
        """The engine does not step inside; weights do not change meanwhile."""
        life = self._alive()
        async with self._switching:
            await life.engine.pause(clear_cache=clear_cache)
            try:
                yield
            finally:
                await life.engine.resume()

    def _check_version(self, life: _Life, version: int) -> None:
        self._same(life)
        if version < self._version:
            raise ValueError(f"weights: version {version} is older than version {self._version}, which is live")

    # Life.

    async def _begin_life(self) -> _Life:
        # Also where versions come packed: a folder that is missing is told in our words.
        self._groups = await asyncio.to_thread(tensor_groups_of, self._student, self._lora)
        transfer = self._make_transfer()
        engine = await VllmEngine.start(
            config=self._config,
            student=self._student,
            max_length=self._max_length,
            version=self._first_version,
            on_step=self._on_step,
            transfer_backend=transfer.backend,
            lora=self._lora,
        )
        try:
            await transfer.connect(engine)
        except BaseException:
            transfer.close()
            await engine.stop()
            raise
        return self._life_of(engine, transfer)

    def _life_of(self, engine: VllmEngine, transfer: Transfer) -> _Life:
        packer = Packer(make_segments(self._way, self._weights_device), self._groups) if self._packs else None
        return _Life(engine, transfer, packer)

    def _make_transfer(self) -> Transfer:
        return make_transfer(
            self._way,
            self._weights_device,
            bucket_bytes=self._weights.bucket_bytes,
            lora=self._lora,
            groups=self._groups,
        )

    async def _watch(self, life: _Life) -> None:
        try:
            await life.engine.watch()
        except GeneratorDied as error:
            self._die(life, error)

    def _alive(self) -> _Life:
        if self._life is None:
            raise GeneratorDied("the generator is not running; call start() first")
        if self._is_dead(self._life):
            raise self._dead(self._life)
        return self._life

    def _same(self, life: _Life) -> None:
        if self._alive() is not life:
            raise GeneratorDied("the generator was stopped")

    @staticmethod
    def _is_dead(life: _Life) -> bool:
        return life.death is not None or life.engine.is_dead

    @staticmethod
    def _dead(life: _Life) -> GeneratorDied:
        died = GeneratorDied(str(life.death) if life.death is not None else "the vLLM engine process has ended")
        died.__cause__ = life.death
        return died

    def _die(self, life: _Life, error: BaseException) -> None:
        """The engine cannot go on: everybody who waits for it is told."""
        if life.death is not None or self._life is not life:
            return
        life.death = error
        life.died.set()
        for entry in list(self._open.values()):
            if entry.task is not asyncio.current_task():
                self._give_up(entry, self._dead(life))
        self._left.set()


def _is_stale(switches: Sequence[_Switch], *, since: int, upto: int) -> bool:
    """Whether tokens of version ``upto`` looked at keys and values of an older one, in a request that entered the
    engine under version ``since``: the last switch in between that says how, says it."""
    kept = [switch.kept_kv for switch in switches if since < switch.version <= upto]
    return bool(kept) and kept[-1]


async def to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Also when the caller is cancelled, who then learns of it afterwards."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await settled(task)
        raise


async def _all(answers: Sequence[Coroutine[Any, Any, Generation]]) -> list[Generation]:
    """In order; when one fails, the others are given up."""
    tasks = [asyncio.ensure_future(answer) for answer in answers]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _of(on_begin: Callable[[int, int], None] | None, request_id: int) -> Callable[[int], None] | None:
    return None if on_begin is None else lambda version: on_begin(request_id, version)
