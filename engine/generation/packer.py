"""Where versions wait for engine processes: packed in a worker thread, one segment each, given back when nobody needs
them any more. Which engines load them, and when, is decided elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from engine.generation.protocol import Bucket
from engine.generation.requests import settled
from engine.generation.segment import Packed, Segment
from engine.generation.version import TensorGroup


class PackedVersion(NamedTuple):
    """A version in memory, whole."""

    segment: Segment
    packed: Packed


class Packer:
    """Owns the segments and the thread.

    Args:
        groups: what the model has.
    """

    def __init__(self, segments: Sequence[Segment], groups: Sequence[TensorGroup]) -> None:
        self._groups = groups
        self._all = segments
        self._free: asyncio.Queue[Segment] = asyncio.Queue()
        """Those that hold nothing."""
        for segment in segments:
            self._free.put_nowait(segment)
        self._copier = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")

    async def pack(
        self, buckets: Iterable[Bucket], *, digest: str | None, is_wanted: Callable[[], bool]
    ) -> PackedVersion | None:
        """Wait for a free segment and copy a version in. Returns or raises only when the thread has let go of
        ``buckets``. What is returned must be given back.

        Returns:
            None when it was not wanted any more.

        Raises:
            ValueError, WeightsMismatch: as ``Segment.pack``.
        """
        segment = await self._free.get()
        packed: Packed | None = None
        is_cancelled = False
        try:
            packing = asyncio.get_running_loop().run_in_executor(
                self._copier,
                lambda: segment.pack(
                    buckets, self._groups, digest=digest, is_wanted=lambda: not is_cancelled and is_wanted()
                ),
            )
            try:
                packed = await asyncio.shield(packing)
            except asyncio.CancelledError:
                is_cancelled = True
                await settled(packing)
                raise
        finally:
            if packed is None:
                self._free.put_nowait(segment)
        return None if packed is None else PackedVersion(segment, packed)

    def give_back(self, version: PackedVersion) -> None:
        self._free.put_nowait(version.segment)

    def close(self) -> None:
        """Give all memory back. Idempotent."""
        for segment in self._all:
            segment.close()
        self._copier.shutdown(wait=False)
