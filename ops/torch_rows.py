"""The row kernel in plain torch: for CPU, and for devices that have no other.

Memory is the slow part: a pass over a [1024, 32000] tensor in RAM costs as much as five passes over the same numbers in
the cache. So rows are worked on a few at a time, in a buffer that fits the second-level cache, and each is read from
its tensor once and written once. The exponentials stay in the buffer until ``expand``, if they are few enough.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.rows import Reduced

_CHUNK = 64
"""Columns that share one maximum."""

_CACHED_BYTES = 1 << 20
"""Of the buffer, that are worked on at a time: half of a usual second-level cache."""

_SAFE_LOGIT = 50.0
"""Logits up to here need no shift: e⁵⁰ times a vocabulary is far from float32's limits, on both sides."""


class TorchRows:
    """Keeps the exponentials of up to ``kept_rows`` rows from ``reduce`` to ``expand``."""

    def __init__(self, kept_rows: int = 256) -> None:
        self._kept_rows = kept_rows
        self._buffer = torch.empty(0)
        self._shift: Tensor | None = None
        """[B]: the exponentials of the rows in the buffer are exp(z − shift); None: it holds nothing."""

    def reduce(self, logits: Tensor, ids: Tensor, *, num_columns: int, k: int) -> Reduced:
        num_rows, keep = logits.shape[0], logits.shape[0] <= self._kept_rows
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        step = self._rows_at_a_time(num_columns, dtype)
        buffer = self._make_buffer(num_rows if keep else min(step, num_rows), num_columns, logits, dtype)
        # Where there is no id, the column behind the last: it is −inf.
        columns = ids.masked_fill(ids < 0, buffer.shape[1] - 1)
        support_logits = torch.empty(ids.shape, dtype=dtype, device=logits.device)
        largest = torch.empty((num_rows, k), dtype=dtype, device=logits.device)
        tail_max, shift, tail_sum = torch.empty((3, num_rows), dtype=dtype, device=logits.device)
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            z = buffer[rows] if keep else buffer[: rows.stop - start]
            z[:, :num_columns].copy_(logits[rows, :num_columns])
            z[:, num_columns:] = -torch.inf
            torch.gather(z, 1, columns[rows], out=support_logits[rows])
            z.scatter_(1, columns[rows], -torch.inf)
            tail_max[rows] = _largest(z, largest[rows])
            _exponentiate(z, tail_max[rows], shift[rows])
            torch.sum(z, dim=1, out=tail_sum[rows])
        self._shift = shift if keep else None
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
        num_rows, kept = logits.shape[0], self._shift
        step = self._rows_at_a_time(num_columns, tail_shift.dtype)
        if kept is not None:
            buffer, scale = self._buffer, tail_scale * (kept - tail_shift).exp_()
        else:
            buffer, scale = self._make_buffer(min(step, num_rows), num_columns, logits, tail_shift.dtype), tail_scale
        named = ids.clamp(min=0)
        gradient = support_gradient.masked_fill(ids < 0, 0.0).to(out.dtype)
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            if kept is not None:
                e = buffer[rows]
            else:
                e = buffer[: rows.stop - start]
                torch.sub(logits[rows, :num_columns], tail_shift[rows].unsqueeze(1), out=e[:, :num_columns])
                e.scatter_(1, ids[rows].masked_fill(ids[rows] < 0, e.shape[1] - 1), -torch.inf).exp_()
            e, target = e[:, :num_columns], out[rows, :num_columns]
            if out.dtype == e.dtype:
                torch.mul(e, scale[rows].unsqueeze(1), out=target)
            else:
                target.copy_(e.mul_(scale[rows].unsqueeze(1)))
            # Added to the 0 that the exponentials have there; where there is no id, 0 is added to column 0.
            target.scatter_add_(1, named[rows], gradient[rows])
        out[:, num_columns:] = 0.0
        self._shift = None

    def _rows_at_a_time(self, num_columns: int, dtype: torch.dtype) -> int:
        return max(1, _CACHED_BYTES // (num_columns * dtype.itemsize))

    def _make_buffer(self, num_rows: int, num_columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """[num_rows, whole chunks], with one column or more behind the last one. Kept from call to call."""
        shape = num_rows, (num_columns // _CHUNK + 1) * _CHUNK
        if self._buffer.shape[1:] != shape[1:] or len(self._buffer) < num_rows or self._buffer.dtype != dtype:
            self._buffer = torch.empty(shape, dtype=dtype, device=like.device)
        self._shift = None
        return self._buffer[:num_rows]


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


def _exponentiate(z: Tensor, tail_max: Tensor, shift: Tensor) -> None:
    """z [B, N] becomes exp(z − shift); which shift is chosen here."""
    if z.device.type == "cpu" and bool((tail_max.abs() <= _SAFE_LOGIT).all()):
        shift.zero_()
    else:
        # A tail of which nothing is left keeps its −inf: exp(−inf − 0) is 0 as it should be, not NaN.
        shift.copy_(tail_max.masked_fill(tail_max == -torch.inf, 0.0))
        z.sub_(shift.unsqueeze(1))
    z.exp_()
