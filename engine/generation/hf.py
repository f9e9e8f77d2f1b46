"""The generator on torch: any transformers causal language model, continuous batching, weights exchanged in flight.

This file is the side that the event loop sees: requests and futures, cancellation, the end. ``decode_thread`` says what
happens when, ``decoder`` what a step computes, ``sampling`` what is drawn, ``kv_cache`` where keys and values lie, and
``staging`` how weights arrive.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from engine.errors import GeneratorDied
from engine.generation.decode_thread import (
    Abort,
    Counts,
    DecodeThread,
    Loaded,
    Stop,
    Submission,
    Submit,
    Switch,
    Withdraw,
)
from engine.generation.decoder import Decoder
from engine.generation.model import load_decodable
from engine.generation.protocol import Aborted, Bucket, Generation, GenerationRequest, GeneratorStatistics
from engine.generation.requests import check_requests, settled
from engine.generation.staging import Staged
from engine.precision import compute_dtype
from engine.recipe import SamplerConfig, StudentConfig, WeightsConfig
from engine.transport.handoff import use_own_stream


class _Open(NamedTuple):
    """A request as the event loop sees it."""

    request_id: int
    result: asyncio.Future[Generation]
    on_begin: Callable[[int], None] | None


class HFGenerator:
    """Satisfies ``engine.generation.protocol.Generator``.

    Requests wait first come, first served for one of ``config.num_slots`` slots; a slot that falls free is refilled
    before the next decode step. Log-probabilities are summed in float64 from float32 logits.

    Args:
        config: slots, device, dtype and threads; how tokens are drawn comes with each request.
        student: the folder that ``start`` loads.
        version: the policy version that this folder holds.
    """

    def __init__(self, *, config: SamplerConfig, student: StudentConfig, version: int = 0) -> None:
        self._config = config
        self._student = student
        self._first_version = version
        self._version = version
        self._thread: DecodeThread | None = None
        self._copier: ThreadPoolExecutor | None = None
        self._loaded: asyncio.Future[Loaded] | None = None
        self._exited: asyncio.Future[None] | None = None
        self._death: BaseException | None = None
        self._counts = Counts()
        """Of the last life, after its end."""
        self._open: dict[int, _Open] = {}
        self._ticket_of: dict[int, int] = {}
        self._next_ticket = 0
        self._updating = asyncio.Lock()
        self._switched: asyncio.Future[int | None] | None = None

    def __repr__(self) -> str:
        state = "died" if self._death is not None else "running" if self._is_ready() else "stopped"
        return f"<HFGenerator {self._student.path!r} {state} version={self._version} open={len(self._open)}>"

    async def start(self) -> None:
        """As the protocol says. After ``stop`` it begins again, with the folder's weights and version."""
        if self._thread is not None:
            raise RuntimeError("the generator is started already; stop it first")
        loop = asyncio.get_running_loop()
        self._death = None
        self._version = self._first_version
        self._loaded, self._exited = loop.create_future(), loop.create_future()
        self._copier = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="weights",
            initializer=self._prepare_copier,
        )
        self._thread = DecodeThread(
            load=self._load, listener=self, post=loop.call_soon_threadsafe, num_threads=self._config.num_threads
        )
        self._thread.start()
        try:
            await asyncio.shield(self._loaded)
        except BaseException:
            await self.stop()
            raise

    async def generate(
        self, request: GenerationRequest, *, on_begin: Callable[[int], None] | None = None
    ) -> Generation:
        return (await self._answer([request], [on_begin]))[0]

    async def generate_wave(
        self, requests: Sequence[GenerationRequest], *, on_begin: Callable[[int, int], None] | None = None
    ) -> list[Generation]:
        return await self._answer(requests, [_for_request(on_begin, request.request_id) for request in requests])

    def abort(self, request_id: int) -> None:
        ticket = self._ticket_of.get(request_id)
        if ticket is not None:
            self._give_up(ticket, Aborted(f"request {request_id} was aborted"))

    async def update_weights(
        self, version: int, buckets: Iterable[Bucket], *, config: WeightsConfig, digest: str | None = None
    ) -> None:
        """As the protocol says. One at a time, in order of calls; cancelled before the switch, it does not happen.

        Raises:
            ValueError: a name or shape that the model does not have, parameters that are missing, or a version below
                the present one. The present weights stay whole.
            WeightsMismatch: what came has another digest. The present weights stay whole.
            GeneratorDied: the engine is gone.
        """
        async with self._updating:
            self._check_alive()
            if version < self._version:
                raise ValueError(f"weights: version {version} is older than version {self._version}, which is live")
            staged = await self._stage(buckets, digest)
            thread = self._check_alive()
            self._switched = asyncio.get_running_loop().create_future()
            thread.inbox.put(Switch(version, staged, config))
            await self._wait_switched(thread, self._switched)

    def capacity(self) -> int:
        return self._config.num_slots

    def statistics(self) -> GeneratorStatistics:
        """``waiting`` counts every open request that is not in a slot."""
        counts = self._counts if self._thread is None else self._thread.counts
        return GeneratorStatistics(
            version=self._version,
            running=counts.running,
            waiting=max(0, len(self._open) - counts.running),
            num_slots=self._config.num_slots,
            tokens_total=counts.tokens_total,
            decode_steps_total=counts.decode_steps_total,
            prefill_tokens_total=counts.prefill_tokens_total,
            busy_s=counts.busy_s,
            paused_s=counts.paused_s,
        )

    async def watch(self) -> None:
        self._check_alive()
        assert self._exited is not None
        await asyncio.shield(self._exited)
        raise self._died()

    async def stop(self) -> None:
        """As the protocol says. A weight update under way ends with GeneratorDied."""
        thread, copier, exited = self._thread, self._copier, self._exited
        if thread is None or copier is None or exited is None:
            return
        for ticket, entry in list(self._open.items()):
            self._give_up(ticket, Aborted(f"request {entry.request_id} was given up: the generator stops"))
        self._thread = self._copier = None
        thread.inbox.put(Stop())
        await asyncio.shield(exited)
        thread.join()
        self._counts = thread.counts._replace(running=0)
        self._loaded = None
        # Idle, or about to see that its copy is no longer wanted.
        copier.shutdown(wait=False)

    # What the decode thread reports; on the event loop, in order.

    def on_loaded(self, loaded: Loaded) -> None:
        assert self._loaded is not None
        self._loaded.set_result(loaded)

    def on_begun(self, tickets: Sequence[int], version: int) -> None:
        for ticket in tickets:
            entry = self._open.get(ticket)
            if entry is None or entry.on_begin is None or entry.result.done():
                continue
            try:
                entry.on_begin(version)
            except Exception as error:  # belongs to whoever waits for the answer
                self._give_up(ticket, error)

    def on_ended(self, ended: Sequence[tuple[int, Generation]]) -> None:
        for ticket, generation in ended:
            entry = self._open.get(ticket)
            if entry is not None and not entry.result.done():
                entry.result.set_result(generation)

    def on_switched(self, version: int | None) -> None:
        if version is not None:
            self._version = version
        assert self._switched is not None
        self._switched.set_result(version)

    def on_exit(self, error: BaseException | None) -> None:
        assert self._exited is not None
        assert self._loaded is not None
        self._exited.set_result(None)
        if error is not None and not self._loaded.done():
            self._loaded.set_exception(error)
            return
        self._death = error
        for entry in self._open.values():
            if not entry.result.done():
                entry.result.set_exception(self._died())
        if self._switched is not None and not self._switched.done():
            self._switched.set_exception(self._died())

    # Requests.

    async def _answer(
        self, requests: Sequence[GenerationRequest], on_begins: Sequence[Callable[[int], None] | None]
    ) -> list[Generation]:
        thread = self._check_alive()
        self._check(requests)
        loop = asyncio.get_running_loop()
        submissions = []
        for request, on_begin in zip(requests, on_begins, strict=True):
            ticket = self._next_ticket
            self._next_ticket += 1
            submissions.append(Submission(ticket, request))
            self._open[ticket] = _Open(request.request_id, loop.create_future(), on_begin)
            self._ticket_of[request.request_id] = ticket
        if submissions:
            thread.inbox.put(Submit(submissions))
        try:
            return list(await asyncio.gather(*(self._open[s.ticket].result for s in submissions)))
        finally:
            for submission in submissions:
                entry = self._open.pop(submission.ticket)
                del self._ticket_of[entry.request_id]
                if entry.result.cancel() or entry.result.cancelled():
                    thread.inbox.put(Abort(submission.ticket))

    def _give_up(self, ticket: int, error: Exception) -> None:
        entry = self._open[ticket]
        if not entry.result.done() and self._thread is not None:
            entry.result.set_exception(error)
            self._thread.inbox.put(Abort(ticket))

    def _check(self, requests: Sequence[GenerationRequest]) -> None:
        assert self._loaded is not None
        loaded = self._loaded.result()
        check_requests(
            requests, open_ids=self._ticket_of, max_length=loaded.max_positions, vocab_size=loaded.vocab_size
        )

    # Weights.

    async def _stage(self, buckets: Iterable[Bucket], digest: str | None) -> Staged:
        """Copy in the worker thread. Returns or raises only when that thread has let go of ``buckets``."""
        thread, copier, loaded = self._thread, self._copier, self._loaded
        assert copier is not None
        assert loaded is not None
        is_cancelled = False

        def is_wanted() -> bool:
            return not is_cancelled and self._thread is thread

        copying = asyncio.get_running_loop().run_in_executor(
            copier, lambda: loaded.result().staging.stage(buckets, digest=digest, is_wanted=is_wanted)
        )
        try:
            return await asyncio.shield(copying)
        except asyncio.CancelledError:
            is_cancelled = True
            await settled(copying)
            raise

    async def _wait_switched(self, thread: DecodeThread, switched: asyncio.Future[int | None]) -> None:
        try:
            await asyncio.shield(switched)
        except asyncio.CancelledError:
            thread.inbox.put(Withdraw())
            # Until the thread has answered, the next update must not touch the spare tensors.
            await settled(switched)
            raise

    # Life.

    def _prepare_copier(self) -> None:
        torch.set_num_threads(self._config.num_threads)
        use_own_stream(torch.device(self._config.device))

    def _load(self) -> Loaded:
        """In the decode thread."""
        config = self._config
        device = torch.device(config.device)
        ready = load_decodable(self._student, dtype=compute_dtype(config.dtype, device), device=device)
        use_own_stream(device)
        decoder = Decoder(ready, num_slots=config.num_slots, version=self._first_version)
        return Loaded(decoder, ready.staging, ready.vocab_size, ready.max_positions)

    def _is_ready(self) -> bool:
        return self._thread is not None and self._loaded is not None and self._loaded.done()

    def _check_alive(self) -> DecodeThread:
        if self._death is not None:
            raise self._died()
        if self._thread is None or not self._is_ready():
            raise GeneratorDied("the generator is not running; call start() first")
        return self._thread

    def _died(self) -> GeneratorDied:
        cause = self._death
        if cause is None:
            return GeneratorDied("the generator was stopped")
        died = GeneratorDied(f"the decode loop ended with {type(cause).__name__}: {cause}")
        died.__cause__ = cause
        return died


def _for_request(on_begin: Callable[[int, int], None] | None, request_id: int) -> Callable[[int], None] | None:
    return None if on_begin is None else lambda version: on_begin(request_id, version)
