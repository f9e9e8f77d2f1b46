"""The own norm is the model's norm, in value and gradient, and takes the place of nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from engine.training.rms_norm import RMSNorm, use_own_norms
from tests.support.models import Arch, load, plain_logits, tiny_model


def in_float64(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def leaf(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).requires_grad_(True)


@pytest.mark.parametrize("shape", [(7,), (5, 7), (1, 4, 7), (2, 3, 4, 7)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_value_and_gradients_are_those_of_the_definition(shape: tuple[int, ...], scale: float) -> None:
    x, weight, pull = leaf(*shape, seed=0), leaf(7, seed=1), leaf(*shape, seed=2).detach()
    norm = RMSNorm(nn.Parameter(weight.detach().clone()), eps=1e-6)
    scaled = (x.detach() * scale).requires_grad_(True)
    exact, exact_weight = scaled.detach().double().requires_grad_(True), weight.detach().double().requires_grad_(True)

    norm(scaled).backward(pull)
    expected = in_float64(exact, exact_weight, 1e-6)
    expected.backward(pull.double())  # type: ignore[no-untyped-call]

    torch.testing.assert_close(norm(scaled).double(), expected, rtol=1e-6, atol=1e-6)
    for found, wanted in ((scaled.grad, exact.grad), (norm.weight.grad, exact_weight.grad)):
        assert found is not None
        assert wanted is not None
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_a_frozen_weight_gets_no_gradient() -> None:
    norm = RMSNorm(nn.Parameter(torch.ones(6), requires_grad=False), eps=1e-6)
    x = leaf(2, 6, seed=3)

    norm(x).sum().backward()

    assert norm.weight.grad is None
    assert x.grad is not None


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_a_model_with_own_norms_computes_the_same_under_the_same_names(tmp_path: Path, arch: Arch) -> None:
    model = load(tiny_model(tmp_path, arch=arch))
    expected, names = plain_logits(model, list(range(30))), list(model.state_dict())
    parameters = dict(model.named_parameters())

    use_own_norms(model)

    assert any(isinstance(module, RMSNorm) for module in model.modules())
    assert list(model.state_dict()) == names
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    torch.testing.assert_close(plain_logits(model, list(range(30))), expected, rtol=1e-5, atol=1e-5)


class _Shifted(LlamaRMSNorm):
    def forward(self, hidden_states: Any) -> Any:
        return super().forward(hidden_states) + 0.01


@pytest.mark.parametrize("norm", [Gemma2RMSNorm(8), _Shifted(8), nn.LayerNorm(8)])
def test_a_norm_that_computes_something_else_stays(norm: nn.Module) -> None:
    model = nn.Sequential(norm)

    use_own_norms(model)

    assert model[0] is norm
