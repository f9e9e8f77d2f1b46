"""What the ranks of one student are told and asked: the seam between the node (``engine.training.megatron``), which
knows rollouts and processes, and the ranks (``engine.training.megatron_inside``), which know Megatron.

Every rank is called with the same method at the same time, in the same order; what differs between ranks is the
work itself: data-parallel ranks get different rollouts, and only ranks of the last pipeline stage get scores. Numpy
and msgspec alone, so that the node never imports Megatron.

    P prompt tokens      T response tokens      K teacher's top-k      E ids of the student's own
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from engine.generation.protocol import Bucket
from engine.objective_config import ObjectiveConfig
from engine.recipe import LearnerConfig, StudentConfig
from engine.training.protocol import EvalResult, TokenLosses
from engine.types import StepReport
from teacher.protocol import Scores

if TYPE_CHECKING:
    import torch

    from engine.generation.shareable import Address

FACTORY = "engine.training.megatron_inside.trainer:make_trainer"
"""What every rank calls, as ``make_trainer(settings=RankSettings, buffers=ExportBuffers) -> RankTrainer``, when
torch.distributed is initialised, and on a GPU the rank's device set. It loads nothing: ``start`` and ``load`` do."""


class RankSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank is made of; the same on all of them."""

    learner: LearnerConfig
    student: StudentConfig
    objective: ObjectiveConfig
    num_steps: int
    """Of the whole run: where the learning rate schedule ends."""
    seed: int


class ExportBuffers(Protocol):
    """Two pieces of memory that the node maps, too: a bucket whose tensors lie in the piece taken last reaches it
    without another copy. Tensors that lie elsewhere are copied there."""

    def take(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """[num_bytes] uint8 on ``device``, the other piece at every call: once for each bucket."""
        ...

    @property
    def taken(self) -> tuple[int, int]:
        """Of the piece taken last: its number, and of how many memories that it has had this is the latest."""
        ...

    def address(self) -> Address:
        """Of the piece taken last, for another rank to map it, once."""
        ...


class RankRollout(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One rollout as a rank sees it."""

    index: int
    """Place in the call's list of rollouts, over all data-parallel ranks."""
    prompt_ids: npt.NDArray[np.int32]
    """[P]"""
    response_ids: npt.NDArray[np.int32]
    """[T]"""
    scores: Scores | None = None
    """None on ranks before the last pipeline stage, and where nothing is compared (``score``)."""
    sampling_logprobs: npt.NDArray[np.float32] | None = None
    """[T] nats: each response token under the distribution it was drawn from; None: it was not drawn."""
    top_ids: npt.NDArray[np.int32] | None = None
    """[T, E]: ids that the student found most likely when it sampled; ``scores.extra_logprobs`` belong to them."""


class RankMicroBatch(msgspec.Struct, frozen=True, kw_only=True):
    """One forward and backward pass: packed into one row, at most ``learner.micro_batch_tokens`` tokens."""

    rollouts: tuple[RankRollout, ...]
    """Empty: other data-parallel ranks have one more than this one, which computes a pass that counts for nothing."""


class RankWork(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's share of one call. The number of micro-batches is the same on every rank."""

    micro_batches: tuple[RankMicroBatch, ...]
    is_last: bool = False
    """Of an ``accumulate``: ``finish_step`` comes next, so gradients may be on their way before. False: not known."""


class RankReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank says of an ``accumulate``; rollouts of its own data-parallel share only."""

    indices: tuple[int, ...]
    """``RankRollout.index`` of each rollout."""
    loss_sums: tuple[float, ...]
    """Of each: the objective summed over its response tokens, nats."""
    num_computed_tokens: int
    """Positions that went through the model, padding included."""
    token_losses: TokenLosses | None = None
    """Of one rollout, in the first call of a step; its ``index`` is a ``RankRollout.index``."""


class RankStep(msgspec.Struct, frozen=True, kw_only=True):
    """What rank 0 says of a step, over all ranks."""

    report: StepReport
    expert_tokens: dict[int, tuple[int, ...]] = {}
    """Of each layer with experts, counted from 0: tokens that were routed to each of them; no padding."""


class RankTrainer(Protocol):
    """One rank's side of the learner. All methods are collective: every rank calls them, with its own work.

    What a call returns is None on ranks that have nothing to say: one rank of each data-parallel share reports
    (last pipeline stage, first tensor- and context-parallel rank), and rank 0 alone where the answer is everybody's.
    Errors are those of ``engine.training.protocol.Trainer``. An error that one rank alone meets must not leave the
    others in a collective: what can be refused is refused before the first one.
    """

    version: int

    def start(self) -> None: ...

    def load(self, folder: Path) -> int | None:
        """Rank 0 reports the version that ``folder`` holds."""
        ...

    def accumulate(self, work: RankWork) -> RankReport | None: ...

    def finish_step(self) -> RankStep | None:
        """Rank 0 reports."""
        ...

    def evaluate(self, work: RankWork) -> Sequence[tuple[int, EvalResult]] | None:
        """(``RankRollout.index``, result)."""
        ...

    def score(self, token_ids: Sequence[int]) -> Sequence[float] | None:
        """Rank 0 reports."""
        ...

    def export(self, *, bucket_bytes: int) -> Iterator[Bucket]:
        """Rank 0 gets the buckets; the others take part until the iterator ends: as many items, what they are is
        ignored.

        Called and advanced in a thread of its own, in which autograd is off. Meanwhile the main thread may be in
        ``accumulate``, ``evaluate`` or ``score``, which only read weights (never in ``finish_step``, ``load`` or
        ``save``): it may wait for whatever it likes, but passes must never wait for an export, and no NCCL collective
        may be part of one, since two that wait for each other's place on the device hang. An iterator that is closed
        early ends on all ranks at once.
        """
        ...

    def save(self, folder: Path) -> None: ...

    def stop(self) -> None: ...
