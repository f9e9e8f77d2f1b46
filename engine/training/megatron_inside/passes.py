"""Micro-batches through the model by Megatron's own schedule, forward alone or with backward; gradients add up in DDP's
buffers, not divided by anything, and summed over ranks in a step's last pass at the earliest.

Every rank makes as many passes. Between ranks of one pipeline activations travel; what a pass found is known on the
last stage alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from engine.training.megatron_inside.inputs import Row, make_row
from engine.training.megatron_inside.loss import Found, Targets, loss_of, make_targets
from engine.training.megatron_inside.model import unwrapped
from engine.training.megatron_inside.overlap import summing
from engine.training.rank_work import RankMicroBatch, RankRollout
from engine.transport.handoff import Uploader
from ops import Objective


@dataclass(frozen=True, eq=False)
class Passes:
    """What some passes have found."""

    found: tuple[Found | None, ...]
    """One per micro-batch on the last stage (None: it had nothing to compare), nothing elsewhere."""
    num_tokens: int
    """Response tokens whose rows this context-parallel rank held; 0 before the last stage."""
    num_computed: int
    """Positions through the model, padding included, over the ranks that share a row."""


def run_passes(
    chunk: DistributedDataParallel,
    micro_batches: Sequence[RankMicroBatch],
    objective: Objective,
    *,
    uploader: Uploader,
    forward_only: bool,
    is_last: bool = False,
    watch: Callable[[Row], AbstractContextManager[None]] = lambda row: nullcontext(),
    **measure: Any,
) -> Passes:
    """Collective.

    Args:
        chunk: the model with what is wrapped around it.
        is_last: no further passes add to the step's gradient.
        watch: entered for each row's forward pass.
        measure: as in ``ops.linear_divergence``.
    """
    counts = _Counts()

    def forward(micro_batches: Iterator[RankMicroBatch], model: nn.Module) -> tuple[Tensor, Any]:
        micro_batch = next(micro_batches)
        row = make_row([_inputs(rollout) for rollout in micro_batch.rollouts], device=uploader.device)
        targets: Targets | None = None
        if parallel_state.is_pipeline_last_stage():
            targets = make_targets(micro_batch.rollouts, row, uploader)
            counts.num_tokens += 0 if targets is None else len(targets.columns)
        counts.num_computed += row.num_computed
        with watch(row):
            hidden = model(row.token_ids, row.position_ids, None, packed_seq_params=row.packing)
        loss = partial(loss_of, model=unwrapped(model), targets=targets, objective=objective, **measure)
        return hidden, loss

    with torch.set_grad_enabled(not forward_only), summing(chunk, is_last=is_last):
        found = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(micro_batches),
            model=chunk,
            num_microbatches=len(micro_batches),
            seq_length=1,  # not looked at: lengths vary, and the stages tell each other
            micro_batch_size=1,
            forward_only=forward_only,
        )
    return Passes(found=tuple(found), num_tokens=counts.num_tokens, num_computed=counts.num_computed)


class _Counts:
    num_tokens = num_computed = 0


def _inputs(rollout: RankRollout) -> npt.NDArray[np.int32]:
    """Without the last token, which predicts nothing."""
    return np.concatenate((rollout.prompt_ids, rollout.response_ids[:-1]))
