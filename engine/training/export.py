"""Which tensors make up a policy version, under which names, in which order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.generation.protocol import Bucket

Named = list[tuple[str, Tensor]]


def named_tensors(model: PreTrainedModel) -> Named:
    """Parameters (tied ones once, under the first of their names) and persistent buffers, detached, in the order of the
    model's state dict. They share memory with the model."""
    parameters = {id(parameter) for parameter in model.parameters()}
    tensors: Named = []
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen and id(tensor) in parameters:
            continue
        seen.add(id(tensor))
        tensors.append((name, tensor.detach()))
    return tensors


def buckets(
    tensors: Iterable[tuple[str, Tensor]], *, bucket_bytes: int, written: torch.cuda.Event | None = None
) -> Iterator[Bucket]:
    """Cut the list, in its order, into buckets of at most ``bucket_bytes``; a larger tensor has a bucket of its own.

    Nothing is copied: the buckets hold the tensors' own memory. ``written``: as in ``Bucket``, for all of them.
    """
    group: Named = []
    size = 0
    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if group and size + num_bytes > bucket_bytes:
            yield _bucket(group, written)
            group, size = [], 0
        group.append((name, tensor))
        size += num_bytes
    if group:
        yield _bucket(group, written)


def _bucket(group: Named, written: torch.cuda.Event | None) -> Bucket:
    names, tensors = zip(*group, strict=True)
    return Bucket(names=names, tensors=tensors, written=written)
