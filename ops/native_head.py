"""A linear head in C, float32 on CPU: logits by blocks, and the work on them while a part of the head is in cache.

    B rows of a block      L lanes: B and what is missing to whole vectors      D width      V columns of this rank

A block is a row kernel (``ops.rows``) with a head before it: to reduce is to make the logits first, to expand is to pass
the gradient on to hidden states and head. So whatever can be asked of logits can be asked here, in the time of the three
products alone. What is computed and how is in ``native_head.c``; here is who calls it, on which threads, and whether it
can be trusted on this machine.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from ops.native_library import native_library
from ops.rows import Reduced
from ops.threads import on_threads
from ops.torch_rows import TorchRows

_log = logging.getLogger(__name__)
_PER_MS = 1e8
"""Operations of products that a thread gets done in a millisecond."""


class _Head(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("columns", "width", "rows", "lanes", "tile", "num_ids", "weight_stride")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "weight", "bias", "logits", "by_lane", "by_width", "ids", "first", "entries", "maxima",
            )
        ),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class HeadGradients:
    """Where the gradients of a block go, float32 with contiguous rows; None where one is not wanted."""

    hidden: Tensor | None = None
    """[B, D], overwritten."""
    weight: Tensor | None = None
    """[V, D], added to."""
    bias: Tensor | None = None
    """[V], added to."""


class NativeHead:
    """The head, and room for one block at a time."""

    def __init__(
        self,
        library: ctypes.CDLL,
        weight: Tensor,
        bias: Tensor | None,
        *,
        num_rows: int,
        workspace: Tensor | None = None,
    ) -> None:
        """
        Args:
            weight: [V, D] float32, rows contiguous; V at least 1.
            bias: [V] float32 or None.
            num_rows: of the largest block.
            workspace: any float32 tensor, contiguous, overwritten; used when it is large enough.
        """
        self.library = library
        self._weight, self._bias = weight, None if bias is None else bias.contiguous()
        self._step = library.head_lanes()
        num_columns, width = weight.shape
        lanes = self._lanes(num_rows)
        if workspace is None or workspace.numel() < num_columns * lanes or not workspace.is_contiguous():
            workspace = torch.empty(num_columns * lanes)
        self._room = workspace.view(-1)
        self._by_lane = torch.empty(library.head_panels(lanes) * width)
        self._by_width = torch.empty(library.head_panels(width) * num_rows)
        self._maxima = torch.empty(library.head_classes(num_columns) * lanes)

    def block(self, hidden: Tensor, gradients: HeadGradients) -> HeadBlock:
        """Of rows [B, D] float32; ends with the next one."""
        num_rows, (num_columns, width) = len(hidden), self._weight.shape
        lanes = self._lanes(num_rows)
        tile = self.library.head_tile(width, lanes)
        head = _Head(
            columns=num_columns,
            width=width,
            rows=num_rows,
            lanes=lanes,
            tile=tile,
            weight_stride=self._weight.stride(0),
            weight=self._weight.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            logits=self._room.data_ptr(),
            by_lane=self._by_lane.data_ptr(),
            by_width=self._by_width.data_ptr(),
            maxima=self._maxima.data_ptr(),
        )
        logits = self._room[: num_columns * lanes].view(num_columns, lanes).t()[:num_rows]
        return HeadBlock(self, head, hidden.contiguous(), logits, gradients)

    def _lanes(self, num_rows: int) -> int:
        return -(-num_rows // self._step) * self._step


class HeadBlock:
    """The row kernel of one block of a head, for its own logits alone. First ``reduce``, then ``expand``, once."""

    def __init__(
        self, owner: NativeHead, head: _Head, hidden: Tensor, logits: Tensor, gradients: HeadGradients
    ) -> None:
        self.logits = logits
        """[B, V], columns contiguous; made by ``reduce``, and their gradient after ``expand``."""
        self._owner = owner  # whose memory the pointers in ``head`` are of
        self._library, self._head, self._hidden, self._gradients = owner.library, head, hidden, gradients
        self._num_tiles = -(-head.columns // head.tile)
        self._ids, self._lists = torch.empty(0), torch.empty(0)

    def reduce(self, logits: Tensor, ids: Tensor, *, num_columns: int, k: int) -> Reduced:
        library, head = self._library, self._head
        assert logits is self.logits
        assert num_columns == head.columns
        num_rows, head.num_ids = ids.shape
        self._ids, self._lists = ids.contiguous(), torch.empty(self._num_tiles + 1 + ids.numel(), dtype=torch.int32)
        head.ids, head.first = self._ids.data_ptr(), self._lists.data_ptr()
        head.entries = head.first + 4 * (self._num_tiles + 1)
        library.head_begin(head, self._hidden.data_ptr(), self._hidden.stride(0))
        support_logits = torch.full(ids.shape, -torch.inf)
        parts: dict[int, tuple[Tensor, Tensor]] = {}

        def make(start: int, end: int) -> None:
            most, total, scratch = torch.empty(head.lanes), torch.empty(head.lanes).double(), torch.empty(2 * head.lanes)
            parts[start] = most, total
            library.head_reduce(
                head, start, end, support_logits.data_ptr(), most.data_ptr(), total.data_ptr(), scratch.data_ptr()
            )

        on_threads(make, self._num_tiles, self._cost_ms)
        most, total = (torch.stack([parts[start][i] for start in sorted(parts)])[:, :num_rows] for i in (0, 1))
        tail_max = most.amax(dim=0)
        shift = tail_max.masked_fill(tail_max == -torch.inf, 0.0)
        tail_sum = (total * (most - shift).double().exp()).sum(dim=0).float()
        tail_max.masked_fill_(tail_sum.isnan(), torch.nan)
        largest = torch.empty(num_rows, k)
        room, step = library.head_scratch_floats(head), library.head_lanes()

        def find(start: int, end: int) -> None:
            scratch = torch.empty(room)
            library.head_finish(
                head, start * step, min(end * step, num_rows), k, tail_sum.data_ptr(), support_logits.data_ptr(),
                largest.data_ptr(), scratch.data_ptr(),
            )  # fmt: skip

        on_threads(find, head.lanes // step, self._cost_ms / 50)
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
        """And the gradients of hidden states, head and bias."""
        head, gradients, num_rows = self._head, self._gradients, len(ids)
        assert out is self.logits
        shift, scale = torch.zeros(2, head.lanes)
        shift[:num_rows], scale[:num_rows] = tail_shift, tail_scale
        support = support_gradient.contiguous()
        weight, bias = gradients.weight, gradients.bias
        parts: dict[int, Tensor] = {}

        def pass_on(start: int, end: int) -> None:
            mine = None
            if gradients.hidden is not None:
                mine = parts[start] = torch.zeros(head.width, head.lanes)
            self._library.head_expand(
                head, start, end, shift.data_ptr(), scale.data_ptr(), support.data_ptr(), _at(weight),
                0 if weight is None else weight.stride(0), _at(bias), _at(mine),
            )  # fmt: skip

        on_threads(pass_on, self._num_tiles, 2 * self._cost_ms)
        if gradients.hidden is not None:
            first, *others = (parts[start][:, :num_rows].t() for start in sorted(parts))
            gradients.hidden.copy_(first)
            for other in others:
                gradients.hidden.add_(other)

    @property
    def _cost_ms(self) -> float:
        return 2 * self._head.lanes * self._head.width * self._head.columns / _PER_MS


@functools.cache
def native_head() -> ctypes.CDLL | None:
    """The library; or None where there is none or it is wrong about a probe, and the log says why."""
    library = native_library()
    if library is None:
        return None
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    head = ctypes.POINTER(_Head)
    for name, arguments in (
        ("head_lanes", []),
        ("head_tile", [number, number]),
        ("head_classes", [number]),
        ("head_panels", [number]),
        ("head_scratch_floats", [head]),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, number
    for name, arguments in (
        ("head_begin", [head, pointer, number]),
        ("head_reduce", [head, number, number, *[pointer] * 4]),
        ("head_finish", [head, number, number, number, *[pointer] * 4]),
        ("head_expand", [head, number, number, *[pointer] * 4, number, pointer, pointer]),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    if not _agrees(library):
        _log.warning("the head's losses run in parts: the compiled kernel %s computes another result", library._name)
        return None
    return library


def _agrees(library: ctypes.CDLL) -> bool:
    """With torch, on a few rows of more tiles than one."""
    random = torch.Generator().manual_seed(0)
    num_rows, width, num_columns = 19, 37, 701
    hidden, weight, bias = (
        torch.randn(shape, generator=random) for shape in ((num_rows, width), (num_columns, width), (num_columns,))
    )
    ids = torch.stack([torch.randperm(num_columns, generator=random)[:7] for _ in range(num_rows)])
    ids[:, 3] = -1
    gradients = HeadGradients(*(torch.zeros_like(tensor) for tensor in (hidden, weight, bias)))
    block = NativeHead(library, weight, bias, num_rows=num_rows).block(hidden, gradients)
    logits = torch.addmm(bias, hidden, weight.t())
    torch_rows = TorchRows()
    other = torch_rows.reduce(logits, ids, num_columns=num_columns, k=5)
    mine = block.reduce(block.logits, ids, num_columns=num_columns, k=5)
    found = [block.logits.clone(), mine.support_logits, mine.tail_max, mine.tail_sum, mine.largest.sort(dim=1).values]
    expected = [logits.clone(), other.support_logits, other.tail_max, other.tail_sum, other.largest.sort(dim=1).values]
    for kernel, rows in ((block, block.logits), (torch_rows, logits)):
        kernel.expand(
            rows,
            rows,
            ids,
            num_columns=num_columns,
            tail_shift=other.tail_max,
            tail_scale=1.0 / other.tail_sum,
            support_gradient=other.support_logits.masked_fill(ids < 0, 0.0),
        )
    assert gradients.hidden is not None and gradients.weight is not None and gradients.bias is not None
    found += [block.logits, gradients.hidden, gradients.weight, gradients.bias]
    expected += [logits, logits @ weight, logits.t() @ hidden, logits.sum(dim=0)]
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, expected, strict=True))


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
