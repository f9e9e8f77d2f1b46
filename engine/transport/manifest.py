"""How two sides know that they hold the same policy version: a digest of the bits of its tensors, in the order in which
they travel."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

_PIECE_WORDS = 64
"""64-bit words whose sum stands for them in the digest: 512 bytes."""


class WeightDigest:
    """128 bits over names, dtypes, shapes and bits of a version's tensors, added one after the other.

    It guards against accidents (a torn copy, a missed bucket, a flipped bit, an optimizer that steps while weights
    travel), not against an adversary: each 512 bytes enter BLAKE2b as the sum of their 64-bit words modulo 2⁶⁴. So
    every change of one word shows, other accidents in a piece go unseen with probability 2⁻⁶⁴, and only words that
    change places within 512 bytes are never seen. For that it runs at the speed of memory: 450 MB take about 25 ms on
    one core, against 490 ms for BLAKE2b over all bytes.
    """

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, name: str, tensor: Tensor) -> None:
        self._digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        words, rest = _words(tensor)
        self._digest.update(words.sum(dim=1).cpu().numpy().data)
        self._digest.update(rest.cpu().numpy().data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The digest of a whole version."""
    digest = WeightDigest()
    for name, tensor in tensors:
        digest.add(name, tensor)
    return digest.hexdigest()


def _words(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The bits as int64 [pieces, words of a piece], and the bytes that do not fill a piece."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = len(flat) - len(flat) % (_PIECE_WORDS * 8)
    aligned = flat if flat.storage_offset() % 8 == 0 else flat.clone()
    return aligned[:whole].view(torch.int64).view(-1, _PIECE_WORDS), aligned[whole:]
