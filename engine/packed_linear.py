"""Linear layers for frozen weights: oneDNN with the weight laid out for it beforehand. CPU only.

A decode step multiplies 8 to 16 rows by every weight. The library that torch uses for plain weights is slow at that:
for 8 rows and an output layer of 49,152 × 576, 18 ms against 7 ms with a packed weight (one AVX-512 thread). At 480
rows of bfloat16 packed is still 12 to 20 % faster, the output layer 30 %. Packing costs as much as copying, once per
version.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import Tensor, nn

_MIN_ELEMENTS = 1 << 16
"""Of a weight: below this, oneDNN's 15 µs per call are more than packing saves."""


_MAX_TERMS = 1024
"""Of one sum in float32: oneDNN adds up a row in one go, and over 1,536 terms its rounding is twice that of a plain
layer. Half precision is summed in float32 anyway and would be rounded once more by cutting it."""

_MAX_OUTPUT_TERMS = 384
"""The same for what stands behind the blocks, which is the output layer. A plain layer sums in blocks of this size, and
the rounding of logits is that of log-probabilities: over 768 tokens of a 24-layer model they were off by 7.8e-6 nats
(root mean square, against float64) with 576 terms in one sum, 5.6e-6 with 288, plain passes are by 5.1e-6. It costs a
tenth of the layer, 1.3 % of a decode step of 16 rows."""

_NUM_PLAIN_BLOCKS = 4
"""Blocks at the front that stay plain in float32. Early ones make the few activations that are a thousand times larger
than the rest ("massive activations"), and all later blocks carry their rounding: with them packed, log-probabilities of
a 24-layer model were up to 2e-4 nats away from a plain pass, without them 3e-5, as two plain passes are."""


_BEHIND = sys.maxsize
"""The number of a block that stands behind all others."""


class PackedLinear(nn.Module):
    """Computes what ``linear`` does. It has no parameter ``weight``: ``pack`` makes what is assigned to ``packed``."""

    def __init__(self, linear: nn.Linear, *, max_terms: int | None = None) -> None:
        """``max_terms``: of one sum in float32; None: as for a layer within the model."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        self.bias = linear.bias
        num_parts = -(-linear.in_features // (max_terms or _MAX_TERMS)) if self.dtype == torch.float32 else 1
        self._width = -(-linear.in_features // num_parts)
        self.packed = self.pack(linear.weight)

    def pack(self, weight: Tensor) -> tuple[Tensor, ...]:
        """[out_features, in_features] by columns in oneDNN's own order; opaque, of no use but in ``forward``."""
        parts = torch.split(weight.detach().to(self.dtype), self._width, dim=1)
        return tuple(torch.ops.mkldnn._reorder_linear_weight(part.contiguous()) for part in parts)

    def forward(self, rows: Tensor) -> Tensor:
        total: Tensor = _multiply(rows[..., : self._width], self.packed[0], self.bias)
        for number, part in enumerate(self.packed[1:], start=1):
            total += _multiply(rows[..., number * self._width : (number + 1) * self._width], part, None)
        return total


def _multiply(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return product


def pack_linears(model: nn.Module, *, device: torch.device) -> Mapping[str, nn.Linear]:
    """Replace the large ``nn.Linear`` layers of a frozen model, where this machine and dtype can; others stay.

    Returns:
        What was replaced, by module name: ``unpack_linears`` puts it back.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and (module.weight.dtype != torch.float32 or _block(name) >= _NUM_PLAIN_BLOCKS)
        and module.weight.numel() >= _MIN_ELEMENTS
        and _can_pack(module.weight.dtype, device)
    }
    for name, linear in linears.items():
        model.set_submodule(
            name, PackedLinear(linear, max_terms=_MAX_OUTPUT_TERMS if _block(name) == _BEHIND else None)
        )
    return linears


def unpack_linears(model: nn.Module, linears: Mapping[str, nn.Linear]) -> None:
    for name, linear in linears.items():
        model.set_submodule(name, linear)


def _block(name: str) -> int:
    """Which block of the model a module is in, by the number in its name; what is in none stands behind the last."""
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    return numbers[0] if numbers else _BEHIND


def _can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    onednn = torch.backends.mkldnn
    if device.type != "cpu" or not onednn.is_available() or not onednn.enabled:  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))
