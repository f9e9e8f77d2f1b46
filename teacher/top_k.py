"""The k largest of each row with equal values in a settled order; or all, as they are. Knows nothing of models.

``torch.topk`` promises no order among equal values, nor which of those at the edge are in; half-precision logits are
full of them.

    R rows      V columns      k of them wanted
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_TIE_ROOM = 64
"""Candidates beyond the k-th that are looked at on a GPU, to see all that equal it."""


def top_k_by_id(values_RV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, descending, equal values by id ascending: also which of several equal ones are in.

    Args:
        values_RV: float32. Of a row that holds a NaN, the result holds one too, and otherwise nothing of use.

    Returns:
        ids [R, k] int32 and values [R, k].
    """
    values, ids = _by_sorting(values_RV, k) if values_RV.device.type != "cpu" else _by_threshold(values_RV, k)
    return ids.to(torch.int32), values


def every_id(values_RV: Tensor) -> Tensor:
    """What belongs to rows of a whole vocabulary: [R, V] int32, each row the same memory."""
    num_rows, num_columns = values_RV.shape
    return torch.arange(num_columns, dtype=torch.int32, device=values_RV.device).expand(num_rows, num_columns)


def of_whole_rows(values_RV: npt.NDArray[np.float32], k: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Ids and values [R, k] of rows of a whole vocabulary: all of them in the order of ids, or the k largest."""
    rows = torch.from_numpy(values_RV)
    ids, values = (every_id(rows), rows) if k == rows.shape[1] else top_k_by_id(rows, k)
    return ids.numpy(), values.numpy()


def _by_threshold(values_RV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find each row's k-th largest, then take what is not below it.

    numpy partitions with vector instructions: 128 rows of 49,152 take 12 ms for k = 256 and for k = 4,096, where
    ``torch.topk`` takes 30 and 82.
    """
    array_RV = values_RV.numpy()
    num_rows, num_columns = array_RV.shape
    kth_R = np.empty(num_rows, array_RV.dtype)
    for row in range(num_rows):  # a copy of one row at a time: it stays in the cache, and no second block exists
        parted = np.partition(array_RV[row], num_columns - k)[num_columns - k :]
        # NaN ranks highest: it is among these if it is anywhere.
        kth_R[row] = np.nan if np.isnan(parted).any() else parted[0]
    if np.isnan(kth_R).any():
        return torch.topk(values_RV, k, dim=-1)
    # In the order of rows and ids.
    candidates = np.flatnonzero(array_RV >= kth_R[:, None])
    if len(candidates) > num_rows * k:
        candidates = _without_surplus(candidates, array_RV, kth_R, k)
    ids_Rk = torch.from_numpy(candidates.reshape(num_rows, k) % num_columns)
    values_Rk, order_Rk = values_RV.gather(1, ids_Rk).sort(dim=-1, descending=True, stable=True)
    return values_Rk, ids_Rk.gather(1, order_Rk)


def _without_surplus(
    candidates: npt.NDArray[np.intp], array_RV: npt.NDArray[np.float32], kth_R: npt.NDArray[np.float32], k: int
) -> npt.NDArray[np.intp]:
    """Of the candidates that equal their row's k-th value, only the lowest ids that make up k."""
    num_rows, num_columns = array_RV.shape
    rows = candidates // num_columns
    is_tied = array_RV.reshape(-1)[candidates] == kth_R[rows]
    num_tied_R = np.bincount(rows[is_tied], minlength=num_rows)
    room_R = k - np.bincount(rows[~is_tied], minlength=num_rows)
    tied_before_R = np.cumsum(num_tied_R) - num_tied_R
    rank = np.cumsum(is_tied) - 1 - tied_before_R[rows]
    kept: npt.NDArray[np.intp] = candidates[~is_tied | (rank < room_R[rows])]
    return kept


def _by_sorting(values_RV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    num_candidates = min(values_RV.shape[-1], k + _TIE_ROOM)
    values, ids = torch.topk(values_RV, num_candidates, dim=-1)
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order)
    last = values[:, -1].clone()
    values, ids = values[:, :k], ids[:, :k]
    if num_candidates < values_RV.shape[-1]:
        # More values equal to the k-th than there was room for: take these rows one by one.
        for row in torch.nonzero(last == values[:, -1]).flatten().tolist():
            tied = torch.nonzero(values_RV[row] >= last[row]).flatten()
            values[row], order = (part[:k] for part in values_RV[row, tied].sort(descending=True, stable=True))
            ids[row] = tied[order]
    return values, ids
