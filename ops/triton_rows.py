"""The row kernel in Triton: which kernels run on how many programs, in what tiles, over which scratch memory.

Bytes moved for [B, W] logits of two bytes: reduce reads 2·B·W, expand reads and writes 2·B·W each. What comes on top is
a maximum per chunk of columns and the k chunks that are read again, about 4 % of the first at 151,936 columns and k=64.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ops.rows import Reduced
from ops.torch_rows import TorchRows
from ops.triton_kernels import expand_row, largest_of_tail, merge_splits, prepare_support, reduce_tail

_MIN_LANES = 16


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How a kernel walks along a row."""

    block: int
    """Columns of a tile; a power of two."""
    num_warps: int
    stages: int = 1
    """Depth of the pipeline through shared memory; 1: none."""
    ahead: bool = False
    """Load the next tile before working on this one (reduce only)."""


REDUCE = Shape(block=1024, num_warps=1)
EXPAND = Shape(block=8192, num_warps=16, stages=3)
PROGRAMS_PER_PROCESSOR = 512
"""Rows are split until each multiprocessor has so many programs."""
CANDIDATES_PER_THREAD = 32
"""Of the search for the k largest."""
SEARCH_REGISTERS: int | None = 128
"""Of a thread in that search, which waits for its own sums most of the time: with fewer registers more rows run at a
time. None: as many as the compiler likes, 164."""


class TritonRows:
    """Stateless. float64 logits, which only tests have, are left to plain torch."""

    def __init__(
        self,
        *,
        reduce: Shape = REDUCE,
        expand: Shape = EXPAND,
        programs_per_processor: int = PROGRAMS_PER_PROCESSOR,
        candidates_per_thread: int = CANDIDATES_PER_THREAD,
        search_registers: int | None = SEARCH_REGISTERS,
    ) -> None:
        self._reduce, self._expand = reduce, expand
        self._programs_per_processor, self._candidates_per_thread = programs_per_processor, candidates_per_thread
        self._search_registers = search_registers
        self._torch = TorchRows()

    def reduce(self, logits: Tensor, ids: Tensor, *, num_columns: int, k: int) -> Reduced:
        if logits.dtype == torch.float64:
            return self._torch.reduce(logits, ids, num_columns=num_columns, k=k)
        ids = ids.contiguous()
        num_rows, width = logits.shape
        sorted_ids, support_logits = self._prepare_support(logits, ids)

        chunk = _chunk(num_columns, k)
        tiles = self._reduce.block // chunk
        chunk_max = logits.new_empty((num_rows, _aligned(triton.cdiv(num_columns, chunk)) if k else 0))
        num_splits, blocks_per_split = self._splits(num_rows, num_columns, self._reduce.block, logits.device)
        maxima, sums = support_logits.new_empty((2, num_rows, num_splits))
        if num_rows:
            reduce_tail[(num_rows * num_splits,)](
                logits,
                logits.stride(0),
                num_columns,
                width,
                sorted_ids,
                chunk_max,
                chunk_max.shape[1],
                maxima,
                sums,
                num_splits,
                blocks_per_split,
                IDS=sorted_ids.shape[1],
                CHUNKS=tiles,
                CHUNK=chunk,
                KEEP_CHUNKS=k > 0,
                AHEAD=self._reduce.ahead,
                num_warps=self._reduce.num_warps,
            )
        tail_max, tail_sum = _merge(maxima, sums)
        return Reduced(
            support_logits=support_logits,
            tail_max=tail_max,
            tail_sum=tail_sum,
            largest=self._largest(logits, num_columns, sorted_ids, chunk_max, chunk, k),
        )

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
        if logits.dtype == torch.float64:
            self._torch.expand(
                out,
                logits,
                ids,
                num_columns=num_columns,
                tail_shift=tail_shift,
                tail_scale=tail_scale,
                support_gradient=support_gradient,
            )
            return
        num_rows, width = logits.shape
        if num_rows == 0:
            return
        num_splits, blocks_per_split = self._splits(num_rows, width, self._expand.block, logits.device)
        expand_row[(num_rows * num_splits,)](
            out,
            out.stride(0),
            logits,
            logits.stride(0),
            num_columns,
            width,
            ids.contiguous(),
            ids.shape[1],
            tail_shift.contiguous(),
            tail_scale.contiguous(),
            support_gradient.contiguous(),
            num_splits,
            blocks_per_split,
            IDS=_power_of_two(ids.shape[1]),
            BLOCK=self._expand.block,
            STAGES=self._expand.stages,
            num_warps=self._expand.num_warps,
        )

    def _prepare_support(self, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """[B, IDS] int32 ascending, and [B, C] float32."""
        num_rows, num_ids = ids.shape
        padded = _power_of_two(num_ids + 1)
        sorted_ids = torch.empty((num_rows, padded), dtype=torch.int32, device=logits.device)
        support_logits = torch.empty((num_rows, num_ids), dtype=torch.float32, device=logits.device)
        if num_rows:
            prepare_support[(num_rows,)](
                logits,
                logits.stride(0),
                ids,
                sorted_ids,
                support_logits,
                num_ids,
                IDS=padded,
                num_warps=_warps(padded, per_thread=4),
            )
        return sorted_ids, support_logits

    def _largest(
        self, logits: Tensor, num_columns: int, sorted_ids: Tensor, chunk_max: Tensor, chunk: int, k: int
    ) -> Tensor:
        largest = torch.empty((logits.shape[0], k), dtype=torch.float32, device=logits.device)
        if not largest.numel():
            return largest
        num_chunks = triton.cdiv(num_columns, chunk)
        padded_k, padded_chunks = _power_of_two(k), _power_of_two(num_chunks)
        largest_of_tail[(logits.shape[0],)](
            logits,
            logits.stride(0),
            num_columns,
            sorted_ids,
            chunk_max,
            chunk_max.shape[1],
            num_chunks,
            torch.empty((logits.shape[0], padded_k), dtype=torch.int32, device=logits.device),
            largest,
            k,
            IDS=sorted_ids.shape[1],
            CHUNKS=padded_chunks,
            CHUNK=chunk,
            K=padded_k,
            num_warps=_warps(max(padded_k * chunk, padded_chunks), per_thread=self._candidates_per_thread),
            maxnreg=self._search_registers,
        )
        return largest

    def _splits(self, num_rows: int, num_columns: int, block: int, device: torch.device) -> tuple[int, int]:
        return splits(num_rows, num_columns, block, self._programs_per_processor * num_processors(device))


def splits(num_rows: int, num_columns: int, block: int, num_programs: int) -> tuple[int, int]:
    """Into how many programs a row is split to make so many in all, and how many tiles each of them gets."""
    num_blocks = max(1, triton.cdiv(num_columns, block))
    wanted = triton.cdiv(num_programs, max(1, num_rows))
    blocks_per_split = triton.cdiv(num_blocks, min(wanted, num_blocks))
    return triton.cdiv(num_blocks, blocks_per_split), blocks_per_split


def _merge(maxima: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """[B, splits] to [B]."""
    num_rows, num_splits = maxima.shape
    if num_splits == 1 or num_rows == 0:
        return maxima[:, 0], sums[:, 0]
    tail_max, tail_sum = maxima.new_empty((2, num_rows))
    padded = _power_of_two(num_splits)
    rows = max(1, 512 // padded)
    merge_splits[(triton.cdiv(num_rows, rows),)](
        maxima, sums, tail_max, tail_sum, num_rows, num_splits, ROWS=rows, SPLITS=padded, num_warps=1
    )
    return tail_max, tail_sum


def _chunk(num_columns: int, k: int) -> int:
    """Columns per chunk: the search looks at num_columns / chunk maxima and at k·chunk columns, here nearly as many."""
    return min((16, 32, 64, 128), key=lambda chunk: max(num_columns / chunk, k * chunk)) if k else 64


def _aligned(count: int) -> int:
    """So that rows of two-byte numbers begin where 16 bytes can be loaded at once."""
    return -(-count // 16) * 16


def _warps(lanes: int, *, per_thread: int) -> int:
    return min(16, max(1, _power_of_two(lanes) // (32 * per_thread)))


def _power_of_two(count: int) -> int:
    return max(_MIN_LANES, 1 << max(0, count - 1).bit_length())


@functools.cache
def num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
