"""How the student's most likely ids travel with its answer: as bytes, because an answer of 2,048 tokens with 64 ids at
each is half a megabyte like this and 4.7 MB of Python integers otherwise."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.types import Rollout

_ON_THE_WAY = np.dtype("<i4")


def pack_ids(ids: npt.NDArray[np.integer]) -> bytes:
    """Of one or more positions, in order; what ``Rollout.top_ids`` is made of."""
    return ids.astype(_ON_THE_WAY, copy=False).tobytes()


def top_ids_of(rollout: Rollout) -> npt.NDArray[np.int32] | None:
    """[T, k], read-only; None where none were kept."""
    if not rollout.top_ids:
        return None
    return np.frombuffer(rollout.top_ids, dtype=_ON_THE_WAY).reshape(rollout.num_tokens, -1)
