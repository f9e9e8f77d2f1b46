"""When gradients and weights travel between data-parallel ranks: with the passes, where the recipe says so.

Megatron does it bucket by bucket, with hooks on every parameter and module. Left to it are the buckets, the hooks and
the collectives; decided here is what its own training loop knows otherwise: which pass is a step's last, and when the
weights of a version are whole.

* A bucket's gradients are summed as soon as the backward pass of the step's last micro-batch has the last of them.
  Rollouts come as they are ready, so which pass that is the node has to say (``RankWork.is_last``). When it does not,
  all buckets are summed at the end of the step.
* Each rank updates its part of the weights. They are gathered from the end of the step on, in the order in which the
  next forward pass takes them; each module waits for its own. A version that leaves meanwhile waits for all of them,
  but takes part in nothing: it is another thread's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import shard_buffer

from engine.transport.handoff import record


class Written(NamedTuple):
    """The moment at which this rank's weights are those of a version. Any thread may wait for it, several times."""

    event: torch.cuda.Event | None
    """None on CPU."""
    gathers: tuple[Any, ...] = ()
    """Under way on CPU, where a collective has no stream."""

    def wait(self, stream: torch.cuda.Stream | None) -> None:
        """Before anything that ``stream`` is asked to do from now on; on CPU the thread waits."""
        if self.event is not None and stream is not None:
            stream.wait_event(self.event)
        for gather in self.gathers:
            gather.wait()


class Gathers(NamedTuple):
    """In Megatron's place for what a group of buckets waits for."""

    works: tuple[dist.Work, ...]

    def wait(self) -> None:
        for work in self.works:
            work.wait()


@contextmanager
def summing(chunk: DistributedDataParallel, *, is_last: bool) -> Iterator[None]:
    """Around the passes of one call: gradients are summed over the ranks during the backward pass of its last
    micro-batch, if this is the step's last call and the recipe wants it; otherwise they only add up."""
    if is_last:
        chunk.config.no_sync_func = chunk.no_sync
        yield
        return
    chunk.config.no_sync_func = None
    with chunk.no_sync():
        yield


def start_sums(chunk: DistributedDataParallel) -> None:
    """Of all gradients that are not on their way yet; Megatron's finalisation waits for them. Collective."""
    if chunk.ddp_config.overlap_grad_reduce:
        for group in _in_forward_order(chunk):
            if group.grad_reduce_handle is None:
                group.start_grad_sync()


def start_gather(chunk: DistributedDataParallel, device: torch.device, stream: torch.cuda.Stream | None) -> Written:
    """Of the weights, after an update or where each rank has got its own. Collective.

    Args:
        stream: of nobody else; None on CPU.
    """
    if not chunk.ddp_config.overlap_param_gather:
        return Written(record(device))
    for group in _in_forward_order(chunk):
        if device.type == "cuda":
            group.start_param_sync()
        else:
            _gather_one_by_one(group)
    gathers = tuple(group.param_gather_handle for group in _in_forward_order(chunk))
    if stream is None:
        return Written(None, gathers)
    with torch.cuda.stream(stream):
        for gather in gathers:
            gather.wait()  # makes this stream wait, and no thread
    return Written(record(device, stream))


def _gather_one_by_one(group: Any) -> None:
    """Megatron's ``start_param_sync`` asks for the buckets of a group together, and two such requests at a time corrupt
    the heap under gloo (torch 2.13, ``allgather_into_tensor_coalesced``; known as pytorch/pytorch#65231)."""
    ranks = group.intra_distributed_optimizer_instance_group
    size, rank = (getattr(group, f"intra_distributed_optimizer_instance_{name}") for name in ("size", "rank"))
    group.param_gather_handle = Gathers(
        tuple(
            dist.all_gather_into_tensor(
                bucket.param_data, shard_buffer(bucket.param_data, size)[rank], group=ranks, async_op=True
            )
            for bucket in group.buckets
        )
    )
    group.param_gather_dispatched = True


def finish_gather(chunk: DistributedDataParallel) -> None:
    """Go on with whole weights: before they are written to disk, or updated."""
    if chunk.ddp_config.overlap_param_gather:
        for group in _in_forward_order(chunk):
            group.finish_param_sync(skip_next_bucket_dispatch=True)


def _in_forward_order(chunk: DistributedDataParallel) -> list[Any]:
    """Megatron's groups of buckets; in its own order the last layers come first."""
    return [*reversed(chunk.bucket_groups), *reversed(chunk.expert_parallel_bucket_groups)]
