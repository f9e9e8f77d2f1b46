"""Which sequence sits in which row, and what one decode step does. Synchronous; knows no queue and no event loop.

    n rows in use (dense from 0)      L positions in the longest row      V vocabulary

A sequence of m known tokens has keys and values for the first m − 1 of them; the last one is the input of the next
step. So a prompt is prefilled without its last token and without the output layer, n samples of a prompt share that
prefill, and a running sequence is rebuilt under new weights by the same prefill over all it has said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from engine.generation.draws import uniforms
from engine.generation.kv_cache import SlotCache
from engine.generation.model import DecodableModel, trunk
from engine.generation.prefill import Prefill, plan_prefill
from engine.generation.protocol import Generation, GenerationRequest
from engine.generation.sampling import BatchSampler
from engine.generation.top_ids import pack_ids
from engine.types import FinishReason, VersionSpan

_LENGTH_GRAIN = 16
"""L is rounded up to this: attention kernels like whole vectors, and the mask is rebuilt for few shapes."""


@dataclass(eq=False, slots=True)
class Running:
    """One sequence in a row."""

    ticket: int
    request: GenerationRequest
    known: list[int]
    """Prompt and answer so far."""
    kv_version: int
    """Weights that computed the keys and values of its prompt."""
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    top_ids: list[bytes] = field(default_factory=list)
    """Of each token, when the request asks for them."""
    spans: list[VersionSpan] = field(default_factory=list)
    """The last one is open: its ``end`` is where it began until the sequence ends."""

    @property
    def num_answer(self) -> int:
        return len(self.logprobs)


class Decoder:
    """Rows, cache and model of one generator. One thread owns it."""

    def __init__(self, ready: DecodableModel, *, num_slots: int, version: int) -> None:
        self.version = version
        self.num_slots = num_slots
        self.tokens_total = 0
        self.decode_steps_total = 0
        self.prefill_tokens_total = 0
        self._device = ready.model.device
        self._trunk = trunk(ready.model)
        self._compute_step = ready.step
        self._cache = SlotCache(num_slots=num_slots)
        self._rows: list[Running | None] = []
        self._rows_changed = True
        self._sampler = BatchSampler([], device=self._device)
        self._keys_n: npt.NDArray[np.uint64] = np.empty(0, dtype=np.uint64)

    @property
    def num_running(self) -> int:
        return sum(row is not None for row in self._rows)

    @property
    def num_free(self) -> int:
        return self.num_slots - self.num_running

    def admit(self, requests: Sequence[tuple[int, GenerationRequest]]) -> None:
        """Put requests with their tickets into free rows, lowest first, and compute their prompts.

        At most ``num_free``. A prompt that another row was begun with, under the same weights, is copied from there.
        """
        assert len(requests) <= self.num_free, f"{len(requests)} requests for {self.num_free} free slots"
        known_prompts = {
            row.request.token_ids: at
            for at, row in reversed(list(enumerate(self._rows)))
            if row is not None and row.kv_version == self.version
        }
        free = iter([at for at, row in enumerate(self._rows) if row is None])
        wanted: list[tuple[tuple[int, ...], int]] = []
        for ticket, request in requests:
            running = Running(ticket=ticket, request=request, known=list(request.token_ids), kv_version=self.version)
            at = next(free, len(self._rows))
            if at == len(self._rows):
                self._rows.append(running)
            else:
                self._rows[at] = running
            prompt = request.token_ids
            if prompt in known_prompts:
                self._cache.copy_row(source=known_prompts[prompt], target=at, length=len(prompt) - 1)
            else:
                wanted.append((prompt[:-1], at))
        self._rows_changed |= bool(requests)
        self._prefill(wanted)

    def remove(self, ticket: int) -> bool:
        """Free the row of a ticket; False when it has none."""
        for at, row in enumerate(self._rows):
            if row is not None and row.ticket == ticket:
                self._rows[at] = None
                self._rows_changed = True
                return True
        return False

    def step(self) -> list[tuple[int, Generation]]:
        """One token for every row; tickets and answers that ended with it, in order of rows. Needs at least one row.

        Raises:
            FloatingPointError: the model's logits are not finite.
        """
        if self._rows_changed:
            self._settle()
        rows = [row for row in self._rows if row is not None]
        logits_nV = self._forward(rows)
        counters_n = np.fromiter((row.num_answer for row in rows), dtype=np.uint64, count=len(rows))
        drawn = self._sampler.draw(logits_nV, uniforms(self._keys_n, counters_n))
        self.decode_steps_total += 1
        self.tokens_total += len(rows)
        ended = []
        for at, row in enumerate(rows):
            num_top_ids = row.request.params.num_top_ids
            if drawn.top_ids is not None and num_top_ids:
                row.top_ids.append(pack_ids(drawn.top_ids[at, :num_top_ids]))
            reason = self._extend(row, drawn.ids[at], drawn.logprobs[at], drawn.sampling_logprobs[at])
            if reason is not None:
                ended.append((row.ticket, _generation(row, reason)))
                self._rows[at] = None
                self._rows_changed = True
        return ended

    def become(self, version: int, *, recompute: bool) -> None:
        """The model's weights are ``version`` from here on; the caller has exchanged them.

        Args:
            recompute: compute the keys and values of all rows anew; otherwise they go on with the old ones.
        """
        self.version = version
        if not recompute:
            return
        wanted = []
        for at, row in enumerate(self._rows):
            if row is not None:
                row.kv_version = version
                wanted.append((tuple(row.known[:-1]), at))
        self._prefill(wanted)

    def _forward(self, rows: Sequence[Running]) -> torch.Tensor:
        device = self._device
        positions_n = torch.tensor([len(row.known) - 1 for row in rows], device=device)
        longest = max(len(row.known) for row in rows)
        length = -(-longest // _LENGTH_GRAIN) * _LENGTH_GRAIN
        self._cache.begin_decode(rows=torch.arange(len(rows), device=device), positions=positions_n, length=length)
        ids_n = torch.tensor([row.known[-1] for row in rows], device=device)
        return self._compute_step(ids_n, positions_n, self._cache).float()

    def _extend(self, row: Running, token: int, logprob: float, sampling_logprob: float) -> FinishReason | None:
        at = row.num_answer
        stale = row.kv_version != self.version
        if not row.spans or row.spans[-1].version != self.version:
            if row.spans:
                row.spans[-1] = _closed(row.spans[-1], at)
            row.spans.append(VersionSpan(version=self.version, start=at, end=at, stale_kv=stale))
        row.known.append(token)
        row.logprobs.append(logprob)
        row.sampling_logprobs.append(sampling_logprob)
        params = row.request.params
        if token in params.stop_ids:
            return "stop"
        return "length" if row.num_answer == params.max_new_tokens else None

    def _settle(self) -> None:
        """Close the holes: the last row moves into the first. Empty rows would cost as much as full ones."""
        while self._rows and self._rows[-1] is None:
            self._rows.pop()
        for at in range(len(self._rows)):
            if at < len(self._rows) and self._rows[at] is None:
                moved = self._rows.pop()
                assert moved is not None
                self._cache.copy_row(source=len(self._rows), target=at, length=len(moved.known) - 1)
                self._rows[at] = moved
                while self._rows[-1] is None:
                    self._rows.pop()
        rows = [row for row in self._rows if row is not None]
        self._sampler = BatchSampler([row.request.params for row in rows], device=self._device)
        self._keys_n = np.array([row.request.stream_key for row in rows], dtype=np.uint64)
        self._rows_changed = False

    def _prefill(self, wanted: Sequence[tuple[tuple[int, ...], int]]) -> None:
        for batch in plan_prefill(wanted):
            self._compute(batch)

    def _compute(self, batch: Prefill) -> None:
        device = self._device
        ids = torch.tensor(batch.token_ids, device=device)
        self._cache.begin_prefill(
            rows=torch.tensor(batch.rows, device=device),
            sources=torch.tensor(batch.sources, device=device),
            length=ids.shape[1],
        )
        # No mask: padding stands after the last token of a row, where causal attention does not look.
        positions = torch.arange(ids.shape[1], device=device).expand(len(ids), -1)
        self._trunk(input_ids=ids, position_ids=positions, past_key_values=self._cache, use_cache=True)
        self.prefill_tokens_total += batch.num_tokens


def _closed(span: VersionSpan, end: int) -> VersionSpan:
    return VersionSpan(version=span.version, start=span.start, end=end, stale_kv=span.stale_kv)


def _generation(row: Running, reason: FinishReason) -> Generation:
    spans = [*row.spans[:-1], _closed(row.spans[-1], row.num_answer)]
    return Generation(
        request_id=row.request.request_id,
        token_ids=tuple(row.known[len(row.request.token_ids) :]),
        logprobs=tuple(row.logprobs),
        sampling_logprobs=tuple(row.sampling_logprobs),
        spans=tuple(spans),
        finish_reason=reason,
        top_ids=b"".join(row.top_ids),
    )
