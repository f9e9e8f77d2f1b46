"""Which tensors make up a policy version, under which names, in which order; and the digest of their bits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.generation.protocol import Bucket

Named = list[tuple[str, Tensor]]

_PIECE_WORDS = 64
"""64-bit words whose sum stands for them in the digest: 512 bytes."""


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


def buckets(tensors: Named, *, bucket_bytes: int) -> Iterator[Bucket]:
    """Cut the list, in its order, into buckets of at most ``bucket_bytes``; a larger tensor has a bucket of its own.

    Nothing is copied: the buckets hold the model's own memory.
    """
    group: Named = []
    size = 0
    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if group and size + num_bytes > bucket_bytes:
            yield _bucket(group)
            group, size = [], 0
        group.append((name, tensor))
        size += num_bytes
    if group:
        yield _bucket(group)


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """128-bit hex digest of names, dtypes, shapes and bits.

    It guards against accidents (a torn copy, a missed bucket, a flipped bit), not against an adversary: each 512 bytes
    enter BLAKE2b as the sum of their 64-bit words modulo 2⁶⁴. So every change of one word shows, other accidents in a
    piece go unseen with probability 2⁻⁶⁴, and only words that change places within 512 bytes are never seen. For that
    it runs at the speed of memory: 450 MB take about 25 ms on one core, against 490 ms for BLAKE2b over all bytes.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        words, rest = _words(tensor)
        digest.update(words.sum(dim=1).cpu().numpy().data)
        digest.update(rest.cpu().numpy().data)
    return digest.hexdigest()


def _words(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The bits as int64 [pieces, words of a piece], and the bytes that do not fill a piece."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = len(flat) - len(flat) % (_PIECE_WORDS * 8)
    aligned = flat if flat.storage_offset() % 8 == 0 else flat.clone()
    return aligned[:whole].view(torch.int64).view(-1, _PIECE_WORDS), aligned[whole:]


def _bucket(group: Named) -> Bucket:
    names, tensors = zip(*group, strict=True)
    return Bucket(names=names, tensors=tensors)
