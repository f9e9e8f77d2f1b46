"""The row kernel in plain torch: for CPU, and for devices that have no other.

Memory is the slow part: a pass over a [1024, 32000] tensor in RAM costs as much as five passes over the same numbers in
the second-level cache. So rows are worked on a few at a time, in one buffer that stays there, and are read from their
tensor once by ``reduce`` and once by ``expand``. To keep the exponentials from one to the other was tried: for as many
rows as make the small work in between worth its calls, they do not fit that cache, and fetching them back costs more
than computing them again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ops.rows import Reduced

_CHUNK = 64
"""Columns that share one maximum."""

_CACHED_BYTES = 1 << 20
"""Of the buffer: half of a usual second-level cache."""

_SAFE_LOGIT = 50.0
"""Logits up to here need no shift: e⁵⁰ times a vocabulary is far from float32's limits, on both sides."""


class TorchRows:
    """Holds one buffer of about a megabyte."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, 0)

    def reduce(self, logits: Tensor, ids: Tensor, *, num_columns: int, k: int) -> Reduced:
        num_rows = len(logits)
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        support_logits = torch.empty(ids.shape, dtype=dtype, device=logits.device)
        largest = torch.empty((num_rows, k), dtype=dtype, device=logits.device)
        tail_max, shift, tail_sum = torch.empty((3, num_rows), dtype=dtype, device=logits.device)
        columns = self._columns(ids, num_columns)
        for rows, z in self._blocks(logits, num_columns, dtype):
            present = z[:, :num_columns].copy_(logits[rows, :num_columns])
            torch.gather(z, 1, columns[rows], out=support_logits[rows])
            z.scatter_(1, columns[rows], -torch.inf)
            tail_max[rows] = _largest(z, largest[rows])
            shift[rows] = _safe_shift(tail_max[rows])
            torch.sum(_exponentiate(present, shift[rows]), dim=1, out=tail_sum[rows])
        tail_sum *= (shift - tail_max.masked_fill(tail_max == -torch.inf, 0.0)).exp_()
        return Reduced(support_logits=support_logits, tail_max=tail_max, tail_sum=tail_sum, largest=largest)

    def expand(
        self,
        out: Tensor,
        logits: Tensor,
        ids: Tensor,
        *,
        num_columns: int,
        tail_shift: Tensor,
        tail_scale: Tensor,
        support_gradient: Tensor,
    ) -> None:
        shift = _safe_shift(tail_shift)
        scale = (tail_scale * (shift - tail_shift).exp_()).unsqueeze(1)
        columns = self._columns(ids, num_columns)
        for rows, z in self._blocks(logits, num_columns, tail_shift.dtype):
            present = z[:, :num_columns].copy_(logits[rows, :num_columns])
            _exponentiate(present, shift[rows]).mul_(scale[rows])
            z.scatter_(1, columns[rows], support_gradient[rows])
            out[rows, :num_columns].copy_(present)
        out[:, num_columns:] = 0.0

    def _columns(self, ids: Tensor, num_columns: int) -> Tensor:
        """Where there is no id, the last column of the buffer, which is always one behind the last that exists."""
        return ids.masked_fill(ids < 0, _buffer_columns(num_columns) - 1)

    def _blocks(self, logits: Tensor, num_columns: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Some rows, and as many of the buffer [rows, whole chunks], at first −inf behind the columns that exist."""
        num_rows, width = len(logits), _buffer_columns(num_columns)
        step = min(num_rows, max(1, _CACHED_BYTES // (width * dtype.itemsize)))
        if self._buffer.shape != (step, width) or self._buffer.dtype != dtype:
            self._buffer = torch.empty((step, width), dtype=dtype, device=logits.device)
        self._buffer[:, num_columns:] = -torch.inf
        for start in range(0, num_rows, max(step, 1)):
            rows = slice(start, min(start + step, num_rows))
            yield rows, self._buffer[: rows.stop - start]


def _buffer_columns(num_columns: int) -> int:
    return (num_columns // _CHUNK + 1) * _CHUNK


def _largest(z: Tensor, out: Tensor) -> Tensor:
    """The k largest of each row of z [B, N] into out [B, k]; returns the largest [B].

    The k largest lie in the k chunks with the largest maxima, so one cheap pass leaves 64 k candidates, and another one
    over these 8 k.
    """
    num_rows, k = out.shape
    chunks = z.view(num_rows, -1, _CHUNK)
    maxima = chunks.amax(dim=2)
    top = maxima.amax(dim=1)
    if k == 0:
        return top
    num_chunks = maxima.shape[1]
    if k * 4 > num_chunks:
        found = z.topk(min(k, z.shape[1]), dim=1).values
        out[:, : found.shape[1]] = found
        out[:, found.shape[1] :] = -torch.inf
        return top
    best = maxima.topk(k, dim=1, sorted=False).indices
    best += torch.arange(0, num_rows * num_chunks, num_chunks, device=z.device).unsqueeze(1)
    candidates = z.view(-1, _CHUNK).index_select(0, best.view(-1)).view(num_rows, 8, -1)
    best = candidates.amax(dim=1).topk(k, dim=1, sorted=False).indices
    candidates = candidates.gather(2, best.unsqueeze(1).expand(-1, 8, -1)).flatten(1)
    torch.topk(candidates, k, dim=1, sorted=False, out=(out, torch.empty_like(best)))
    return top


def _safe_shift(largest: Tensor) -> Tensor:
    """[B] what is taken off the logits before exp: the largest, or nothing where the logits are small anyway. A row of
    which nothing is left (or only −inf) keeps its −inf: exp(−inf − 0) is 0 as it should be, not NaN."""
    return largest.masked_fill(largest.abs() <= _SAFE_LOGIT, 0.0).masked_fill_(largest == -torch.inf, 0.0)


def _exponentiate(z: Tensor, shift: Tensor) -> Tensor:
    """z [B, N] becomes exp(z − shift)."""
    if z.device.type != "cpu" or bool(shift.any()):
        z.sub_(shift.unsqueeze(1))
    return z.exp_()
