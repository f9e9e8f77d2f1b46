"""RMS norm with fewer passes over memory: exchanged for a model's own norms where a probe shows that they are the same.

transformers writes it out in six operations, and autograd keeps what lies between them and runs a dozen backwards. Here
the forward pass is a norm and two products and the backward pass is written down: [2900, 128] float32, forward and
backward, 1.2 ms instead of 2.9 (one core); [2900, 256], forward alone, 0.5 instead of 0.9.

    N rows      D hidden size      r = (mean of x² + ε)^−½ [N, 1]      y = x · r · w
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """y = x · (mean of x² over the last dimension + ``eps``)^−½ · ``weight``, computed in float32.

    Args:
        weight: [D]; held, not copied.
    """

    def __init__(self, weight: nn.Parameter, *, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Norm.apply(x.float(), self.weight.float(), self.eps)  # type: ignore[no-untyped-call]
        return y if y.dtype == x.dtype else y.to(x.dtype)


@torch.no_grad()
def use_own_norms(model: nn.Module) -> None:
    """Replace the norms of ``model`` that compute what ``RMSNorm`` does; parameters keep their names and identity."""
    for name, module in list(model.named_modules()):
        weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
        if isinstance(weight, nn.Parameter) and isinstance(eps, float) and not list(module.children()):
            own = RMSNorm(weight, eps=eps)
            if _agree(module, own):
                model.set_submodule(name, own)


def _agree(module: nn.Module, own: RMSNorm) -> bool:
    """Tried out where ``eps`` matters and where it does not."""
    weight = own.weight
    probe = torch.linspace(-1.0, 2.0, 3 * len(weight), device=weight.device).reshape(3, -1)
    probe *= torch.tensor([[1e-3], [1.0], [100.0]], device=weight.device)
    probe = probe.to(weight.dtype)
    # Of the largest: models in half precision round between the two products, here it is once at the end.
    tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
    expected, found = module(probe).float(), own(probe).float()
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        y: Tensor = (x * scale).mul_(weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """dw = Σ g x r;  dx = g w r − x r³ / D · Σ_D (g w x)."""
        x, weight, scale = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            width = x.shape[-1]
            grad_x = grad * x
            rows_ND, scale_N = grad_x.reshape(-1, width), scale.reshape(-1)
            weight_grad = torch.mv(rows_ND.t(), scale_N) if ctx.needs_input_grad[1] else None
            if not ctx.needs_input_grad[0]:
                return None, weight_grad, None
            pull = torch.mv(rows_ND, weight).mul_(scale_N.pow(3)).div_(width).view(scale.shape)
            return (grad * weight).mul_(scale).addcmul_(x, pull, value=-1), weight_grad, None
