"""A linear head in C, float32 on CPU: logits by blocks, and the work on them while a part of the head is in cache.

    B rows of a block      L lanes: rows of the largest, up to whole vectors      D width      V columns of this rank

A block is a row kernel (``ops.rows``) with a head before it: to reduce is to make the logits first, to expand is to
pass the gradient on to hidden states and head. So whatever can be asked of logits can be asked here, in little more
than the time of the three products. What is computed and how is in ``native_head.c``; here is who calls it, on which
threads, and whether it can be trusted on this machine.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import Any

import torch
from torch import Tensor

from ops.native_library import floats, native_library
from ops.rows import Reduced
from ops.threads import on_threads
from ops.torch_rows import TorchRows

_log = logging.getLogger(__name__)
_PER_MS = 1e8
"""Operations of products that a thread gets done in a millisecond."""


class _Head(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("columns", "width", "lanes", "tile", "weight_stride", "grad_stride")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "weight", "bias", "weight_grad", "bias_grad", "logits", "by_lane", "by_width", "maxima",
            )
        ),
    )  # fmt: skip


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "num_ids")),
        *(
            (name, ctypes.c_void_p)
            for name in ("ids", "first", "entries", "support_logits", "shift", "scale", "support_gradient")
        ),
    )


class NativeHead:
    """One block after the other: ``block``, its ``reduce``, its ``expand`` if gradients are wanted; at last ``end``."""

    def __init__(
        self,
        library: ctypes.CDLL,
        weight: Tensor,
        bias: Tensor | None,
        *,
        num_rows: int,
        weight_grad: Tensor | None = None,
        bias_grad: Tensor | None = None,
        workspace: Tensor | None = None,
    ) -> None:
        """
        Args:
            weight: [V, D] float32, rows contiguous; V at least 1.
            bias: [V] float32 or None.
            num_rows: of the largest block.
            weight_grad: [V, D] float32, rows contiguous, added to; None: not wanted.
            bias_grad: [V] float32, added to; None: not wanted.
            workspace: any float32 tensor, overwritten; used when it is contiguous and large enough.
        """
        self.library = library
        num_columns, width = weight.shape
        lanes = -(-num_rows // library.head_lanes()) * library.head_lanes()
        if workspace is None or workspace.numel() < num_columns * lanes or not workspace.is_contiguous():
            workspace = floats(num_columns * lanes)
        by_lane, by_width, maxima = (
            floats(size)
            for size in (
                library.head_panels(lanes) * width,
                library.head_panels(width) * num_rows,
                library.head_classes(num_columns) * lanes,
            )
        )
        bias = None if bias is None else bias.contiguous()
        self._alive = weight, bias, weight_grad, bias_grad, by_lane, by_width, maxima
        self._logits = workspace.view(-1)[: num_columns * lanes].view(num_columns, lanes).t()
        self.fields = _Head(
            columns=num_columns,
            width=width,
            lanes=lanes,
            tile=library.head_tile(width, lanes),
            weight_stride=weight.stride(0),
            grad_stride=0 if weight_grad is None else weight_grad.stride(0),
            weight=_at(weight),
            bias=_at(bias),
            weight_grad=_at(weight_grad),
            bias_grad=_at(bias_grad),
            logits=_at(workspace),
            by_lane=_at(by_lane),
            by_width=_at(by_width),
            maxima=_at(maxima),
        )
        self.num_tiles = -(-num_columns // self.fields.tile)
        self._ending: HeadBlock | None = None

    def block(self, hidden: Tensor, hidden_grad: Tensor | None) -> HeadBlock:
        """
        Args:
            hidden: [B, D] float32.
            hidden_grad: [B, D] float32, overwritten; None: not wanted.
        """
        return HeadBlock(self, self._logits[: len(hidden)], hidden.contiguous(), hidden_grad)

    def leave(self, block: HeadBlock) -> None:
        """What it passes on is passed on when the next one begins, or at the end."""
        self._ending = block

    def end(self) -> None:
        """All gradients are whole after this."""
        if self._ending is not None:
            self.go_on(None)

    def go_on(self, begins: HeadBlock | None) -> tuple[Tensor, Tensor]:
        """Of the block that begins, the largest logits of the tail [parts, L] and Σ exp(z - largest) [parts, L]."""
        ends, self._ending = self._ending, None
        wants_hidden = ends is not None and ends.hidden_grad is not None
        fields, parts = self.fields, dict[int, tuple[Tensor, Tensor, Tensor | None]]()

        def work(start: int, end: int) -> None:
            most, total, scratch = (
                floats(fields.lanes),
                floats(fields.lanes).double(),
                floats(2 * fields.lanes),
            )
            hidden_grad = floats(fields.width, fields.lanes).zero_() if wants_hidden else None
            parts[start] = most, total, hidden_grad
            self.library.head_pass(
                fields, None if ends is None else ends.fields, None if begins is None else begins.fields, start, end,
                _at(hidden_grad), _at(most), _at(total), _at(scratch),
            )  # fmt: skip

        num_products = (begins is not None) + 2 * (ends is not None)
        on_threads(work, self.num_tiles, num_products * self.product_ms)
        most, total, hidden_grads = zip(*(parts[start] for start in sorted(parts)), strict=True)
        if ends is not None and ends.hidden_grad is not None:
            ends.hidden_grad.zero_()
            for part in hidden_grads:
                ends.hidden_grad.add_(part.t()[: len(ends.hidden_grad)])
        return torch.stack(most), torch.stack(total)

    @property
    def product_ms(self) -> float:
        """Of one thread, about."""
        operations: int = 2 * self.fields.lanes * self.fields.width * self.fields.columns
        return operations / _PER_MS


class HeadBlock:
    """The row kernel of one block of a head, for its own logits alone."""

    def __init__(self, head: NativeHead, logits: Tensor, hidden: Tensor, hidden_grad: Tensor | None) -> None:
        self.logits = logits
        """[B, V], columns contiguous: there from ``reduce`` to ``expand``."""
        self.hidden_grad = hidden_grad
        self._head, self._hidden = head, hidden

    def reduce(self, logits: Tensor, ids: Tensor, *, num_columns: int, k: int) -> Reduced:
        head, library, num_rows = self._head, self._head.library, len(ids)
        assert logits is self.logits
        assert num_columns == head.fields.columns
        ids, support_logits = ids.contiguous(), floats(*ids.shape).fill_(-torch.inf)
        lists = torch.empty(head.num_tiles + 1 + ids.numel(), dtype=torch.int32, device="cpu")
        self._alive = ids, support_logits, lists
        first, entries = lists[: head.num_tiles + 1], lists[head.num_tiles + 1 :]
        self.fields = _Block(
            rows=num_rows,
            num_ids=ids.shape[1],
            ids=_at(ids),
            first=_at(first),
            entries=_at(entries),
            support_logits=_at(support_logits),
        )
        library.head_begin(head.fields, self.fields, _at(self._hidden), self._hidden.stride(0))
        most, total = (part[:, :num_rows] for part in head.go_on(self))
        tail_max = most.amax(dim=0)
        shift = tail_max.masked_fill(tail_max == -torch.inf, 0.0)
        tail_sum = (total * (most - shift).double().exp()).sum(dim=0).float()
        tail_max.masked_fill_(tail_sum.isnan(), torch.nan)
        largest = floats(num_rows, k)
        room, step = library.head_scratch_floats(head.fields, self.fields), library.head_lanes()

        def find(start: int, end: int) -> None:
            scratch = floats(room)
            library.head_finish(
                head.fields, self.fields, start * step, min(end * step, num_rows), k, _at(tail_sum), _at(largest),
                _at(scratch),
            )  # fmt: skip

        on_threads(find, -(-num_rows // step), head.product_ms / 20)
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
        """The gradient takes the place of the logits, and is passed on, when the next block begins: see ``end``."""
        assert out is self.logits
        head, num_rows = self._head, len(ids)
        shift, scale = floats(2, head.fields.lanes).zero_()
        shift[:num_rows], scale[:num_rows] = tail_shift, tail_scale
        support_gradient = support_gradient.contiguous()
        self._gradient = shift, scale, support_gradient
        self.fields.shift, self.fields.scale, self.fields.support_gradient = map(_at, self._gradient)
        head.library.head_end(head.fields, self.fields, _at(self._hidden), self._hidden.stride(0))
        head.leave(self)


@functools.cache
def native_head() -> ctypes.CDLL | None:
    """The library; or None where there is none or it is wrong about a probe, and the log says why."""
    library = native_library()
    if library is None:
        return None
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    head, block = ctypes.POINTER(_Head), ctypes.POINTER(_Block)
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "head_lanes": (number, []),
        "head_suits": (number, [number, number]),
        "head_tile": (number, [number, number]),
        "head_classes": (number, [number]),
        "head_panels": (number, [number]),
        "head_scratch_floats": (number, [head, block]),
        "head_begin": (None, [head, block, pointer, number]),
        "head_end": (None, [head, block, pointer, number]),
        "head_pass": (None, [head, block, block, number, number, *[pointer] * 4]),
        "head_finish": (None, [head, block, number, number, number, *[pointer] * 3]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    with torch.device("cpu"):
        agrees = _agrees(library)
    if not agrees:
        _log.warning("the head's losses run in parts: the compiled kernel %s computes another result", library._name)
        return None
    return library


def _agrees(library: ctypes.CDLL) -> bool:
    """With torch, on two blocks and a few tiles."""
    random = torch.Generator().manual_seed(0)
    num_rows, width, num_columns = 35, 37, 701
    hidden, weight, bias = (
        torch.randn(shape, generator=random, dtype=torch.float32)
        for shape in ((num_rows, width), (num_columns, width), (num_columns,))
    )
    ids = torch.stack([torch.randperm(num_columns, generator=random)[:7] for _ in range(num_rows)])
    ids[:, 3] = -1
    hidden_grad, weight_grad, bias_grad = (torch.zeros_like(tensor) for tensor in (hidden, weight, bias))
    head = NativeHead(library, weight, bias, num_rows=19, weight_grad=weight_grad, bias_grad=bias_grad)
    logits, plain = torch.addmm(bias, hidden, weight.t()), TorchRows()
    found: list[Tensor] = []
    expected: list[Tensor] = []
    for rows in (slice(0, 19), slice(19, num_rows)):
        block = head.block(hidden[rows], hidden_grad[rows])
        for kernel, z, results in ((block, block.logits, found), (plain, logits[rows], expected)):
            reduced = kernel.reduce(z, ids[rows], num_columns=num_columns, k=5)
            results += [z.clone(), reduced.support_logits, reduced.tail_max, reduced.tail_sum]
            kernel.expand(
                z,
                z,
                ids[rows],
                num_columns=num_columns,
                tail_shift=reduced.tail_max,
                tail_scale=1.0 / reduced.tail_sum,
                support_gradient=reduced.support_logits.masked_fill(ids[rows] < 0, 0.0),
            )
    head.end()
    found += [hidden_grad, weight_grad, bias_grad]
    expected += [logits @ weight, logits.t() @ hidden, logits.sum(dim=0)]
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, expected, strict=True))


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
