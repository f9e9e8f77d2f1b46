"""A vocabulary cut into shards, one per rank of a process group: who holds which ids, and the sums over all of them.

    W columns of this rank, of which some may be padding      V the real vocabulary      T rows, the same on every rank

Shards follow each other in the order of the group's ranks and may have different widths. What a rank needs of the
others is the largest logit of the tail (MAX, [T]), the logits of the support and the tail's sum of exponentials (SUM,
[T, C+2]) and, for the metric of overlap, how many of its logits are larger than each of the list (SUM, [T, K]).
The gradient of a rank's shard follows from these, so the backward pass says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ops.counting import count_larger
from ops.rows import Reduced
from ops.scores import Support


@dataclass(frozen=True, eq=False)
class Shard:
    """This rank's part of the vocabulary."""

    start: int
    """Id of the first column."""
    num_columns: int
    """Columns that exist: the real ones among the W."""
    vocab_size: int
    """V."""
    group: Any = None
    """Process group of more than one rank; None: this rank holds all."""

    def local(self, ids: Tensor) -> Tensor:
        """Columns of this rank; −1 for ids of others and where there is none."""
        if self.group is None:
            return ids
        columns = ids - self.start
        return columns.masked_fill((columns < 0) | (columns >= self.num_columns), -1)

    def max(self, tensor: Tensor) -> Tensor:
        """In place, over all ranks."""
        if self.group is not None:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """In place, over all ranks."""
        if self.group is not None:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.group)
        return tensor

    def gather_columns(self, tensor: Tensor) -> Tensor:
        """[T, N] of each rank side by side, in the order of the vocabulary."""
        if self.group is None:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.cat(parts, dim=1)


@dataclass(frozen=True, eq=False)
class Whole:
    """Rows of all shards together, as far as an objective looks. float64, equal on every rank."""

    support_logits: Tensor
    """[T, C]; −inf where there is no column."""
    tail_shift: Tensor
    """[T]: the largest logit of the tail, 0 where there is none."""
    tail_sum: Tensor
    """[T]: Σ exp(z − tail_shift)."""
    num_larger: Tensor
    """[T, K] int64: logits that are larger than that of a listed id; k or more of the tail may count as k."""
    sampled_logits: Tensor
    """[T]; meaningless where nothing was sampled."""

    @property
    def tail_lse(self) -> Tensor:
        """[T]; −inf when the tail is empty."""
        return self.tail_sum.log() + self.tail_shift


def combine(shard: Shard, reduced: Reduced, logits: Tensor, support: Support) -> Whole:
    """Three all-reduces.

    Args:
        reduced: of this rank's ``logits`` [T, W] and its columns of ``support``.
    """
    sampled_logits = _column(logits, shard.local(support.sampled_ids))
    support_logits, local_max, tail_sum = reduced.support_logits.double(), reduced.tail_max.double(), reduced.tail_sum
    tail_max = shard.max(local_max.clone())
    tail_shift = tail_max.masked_fill(tail_max == -torch.inf, 0.0)
    tail_sum = tail_sum.double() * (local_max - tail_shift).exp()
    if shard.group is not None:
        # An id has one owner: the others add 0.
        support_logits = support_logits.masked_fill(shard.local(support.ids) < 0, 0.0)
        sums = torch.cat((support_logits, tail_sum.unsqueeze(1), sampled_logits.double().unsqueeze(1)), dim=1)
        shard.sum(sums)
        support_logits = sums[:, :-2].masked_fill(support.ids < 0, -torch.inf)
        tail_sum, sampled_logits = sums[:, -2], sums[:, -1]
    # Ids of other ranks are −inf here. Of the tail no more than k count, and whoever needs to know more is not among k.
    numbers = torch.cat((reduced.support_logits, reduced.largest), dim=1)
    return Whole(
        support_logits=support_logits,
        tail_shift=tail_shift,
        tail_sum=tail_sum,
        num_larger=shard.sum(count_larger(numbers, support_logits[:, : support.num_top].to(numbers.dtype))),
        sampled_logits=sampled_logits.double(),
    )


def _column(logits: Tensor, columns: Tensor) -> Tensor:
    """[T] logits at [T] columns; 0 at −1."""
    if logits.shape[1] == 0:
        return logits.new_zeros(len(columns))
    return logits.gather(1, columns.clamp(min=0).unsqueeze(1)).squeeze(1).masked_fill(columns < 0, 0.0)


def find_shard(
    width: int,
    *,
    device: torch.device,
    group: Any,
    vocab_size: int | None,
    vocab_start: int | None,
    alike: tuple[int, ...] = (),
    problem: str = "",
) -> Shard:
    """Where this rank's columns lie.

    Without ``vocab_start`` the ranks tell each other their widths. A rank that has a ``problem`` (of whatever kind, in
    words) says so instead, and all ranks raise: none waits for one that has given up.

    Args:
        alike: what must be the same on every rank, as it decides about collectives: rows, and rows of a block.

    Raises:
        ValueError: there is a problem here or elsewhere, or the sizes contradict each other.
    """
    if group is None or dist.get_world_size(group) == 1:
        if not problem and vocab_start:
            problem = f"vocab_start={vocab_start} needs a tp_group of more than one rank, which holds the other columns"
        if not problem and vocab_size is not None and not 0 < vocab_size <= width:
            problem = f"vocab_size must be from 1 to the {width} columns of the logits, got {vocab_size}"
        if problem:
            raise ValueError(problem)
        num_columns = width if vocab_size is None else vocab_size
        return Shard(start=0, num_columns=num_columns, vocab_size=num_columns)
    if vocab_start is None:
        mine = torch.tensor([-1 if problem else width, *alike], device=device)
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, mine, group=group)
        widths, *others = torch.stack(gathered, dim=1).tolist()
        if not problem and min(widths) < 0:
            problem = f"rank {widths.index(-1)} of the tp_group was called with bad input; its error says with what"
        if not problem and any(len(set(numbers)) > 1 for numbers in others):
            problem = f"all ranks of the tp_group must have as many rows and rows per block, they have {others}"
        total = sum(widths)
        if not problem and vocab_size is not None and not 0 < vocab_size <= total:
            problem = f"vocab_size must be from 1 to the {total} columns of all shards, got {vocab_size}"
        vocab_start = sum(widths[: dist.get_rank(group)])
        vocab_size = total if vocab_size is None else vocab_size
    elif not problem and vocab_size is None:
        problem = "vocab_start needs vocab_size: without it, where the shards end is not known"
    if problem:
        raise ValueError(problem)
    assert vocab_size is not None
    num_columns = min(max(vocab_size - vocab_start, 0), width)
    return Shard(start=vocab_start, num_columns=num_columns, vocab_size=vocab_size, group=group)
