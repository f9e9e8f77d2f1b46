"""Which random stream belongs to what. Every draw in a run comes from a key made here, so no draw depends on timing."""

from __future__ import annotations

import hashlib


def stream_key(purpose: str, *parts: int) -> int:
    """A 64-bit key for one independent random stream.

    ``stream_key("sample", seed, epoch, prompt_index, sample_index)`` is the stream of one rollout. Equal arguments give
    equal keys on every machine and Python version (BLAKE2b, not ``hash``); a different purpose or part gives an
    unrelated key.
    """
    digest = hashlib.blake2b(digest_size=8, person=purpose.encode()[:16])
    for part in parts:
        digest.update(part.to_bytes(16, "little", signed=True))
    return int.from_bytes(digest.digest(), "little")


def uniform(key: int) -> float:
    """The first draw of a stream: uniform in [0, 1)."""
    # 53 bits, so that the largest key does not round up to 1.
    return (stream_key("uniform", key) >> 11) * 2.0**-53
