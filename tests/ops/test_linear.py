from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ops import ForwardKL, Objective, TeacherScores, divergence, linear_divergence, linear_divergence_with_gradients
from tests.ops.cases import OBJECTIVES, LargestRows, make_case

V, D = 23, 6


@dataclass
class Inputs:
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scores: TeacherScores


def make_inputs(*, num_rows: int = 7, dtype: torch.dtype = torch.float64, bias: bool = True) -> Inputs:
    random = torch.Generator().manual_seed(3)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_()

    return Inputs(
        hidden=leaf(num_rows, D),
        weight=leaf(V, D),
        bias=leaf(V) if bias else None,
        scores=make_case(num_rows=num_rows, vocab_size=V, top_k=5).scores,
    )


def gradients(values: Tensor, inputs: Inputs, weights: Tensor) -> list[Tensor]:
    leaves = [leaf for leaf in (inputs.hidden, inputs.weight, inputs.bias) if leaf is not None]
    return list(torch.autograd.grad(values, leaves, weights))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weights", ["ones", "uniform", "by row"])
def test_it_is_the_divergence_of_the_product_for_any_gradient_of_the_values(
    objective: Objective, bias: bool, weights: str
) -> None:
    inputs = make_inputs(bias=bias)
    scale = {
        "ones": torch.ones(7),
        "uniform": torch.full((7,), 0.25),
        "by row": torch.tensor([1.0, 0.0, -2.0, 0.5, 1.0, 3.0, 0.0]),
    }[weights].double()
    logits = torch.nn.functional.linear(inputs.hidden, inputs.weight, inputs.bias)
    expected = divergence(objective, logits, inputs.scores)

    found = linear_divergence(objective, inputs.hidden, inputs.weight, inputs.scores, inputs.bias, block_rows=3)
    torch.testing.assert_close(found.values, expected.values)
    torch.testing.assert_close(found.metrics, expected.metrics)
    torch.testing.assert_close(
        gradients(found.values, inputs, scale), gradients(expected.values, inputs, scale), rtol=1e-11, atol=1e-13
    )


@pytest.mark.parametrize("block_rows", [1, 2, 3, 7, 100])
def test_the_size_of_the_blocks_changes_nothing(block_rows: int) -> None:
    inputs = make_inputs()
    expected = linear_divergence(ForwardKL(), inputs.hidden, inputs.weight, inputs.scores, inputs.bias)

    found = linear_divergence(
        ForwardKL(), inputs.hidden, inputs.weight, inputs.scores, inputs.bias, block_rows=block_rows
    )
    ones = torch.ones(7, dtype=torch.float64)
    torch.testing.assert_close(found.values, expected.values)
    torch.testing.assert_close(gradients(found.values, inputs, ones), gradients(expected.values, inputs, ones))


def test_gradcheck_through_hidden_head_and_bias() -> None:
    inputs = make_inputs(num_rows=3)
    assert inputs.bias is not None

    def values(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_divergence(ForwardKL(), hidden, weight, inputs.scores, bias, block_rows=2).values

    assert torch.autograd.gradcheck(values, (inputs.hidden, inputs.weight, inputs.bias))


def test_a_tied_head_gets_both_gradients() -> None:
    inputs = make_inputs(bias=False)
    ids = torch.arange(7)

    def gradient(fused: bool) -> Tensor:
        hidden = inputs.weight[ids] * 2.0
        if fused:
            values = linear_divergence(ForwardKL(), hidden, inputs.weight, inputs.scores, block_rows=2).values
        else:
            values = divergence(ForwardKL(), hidden @ inputs.weight.t(), inputs.scores).values
        return torch.autograd.grad(values.sum(), inputs.weight)[0]

    torch.testing.assert_close(gradient(fused=True), gradient(fused=False))


def test_only_the_gradients_that_are_asked_for_are_there() -> None:
    inputs = make_inputs()
    inputs.weight.requires_grad_(False)
    assert inputs.bias is not None
    inputs.bias.requires_grad_(False)

    values = linear_divergence(ForwardKL(), inputs.hidden, inputs.weight, inputs.scores, inputs.bias).values
    torch.autograd.backward(values.sum())
    assert inputs.hidden.grad is not None
    assert inputs.weight.grad is None
    with torch.no_grad():
        again = linear_divergence(ForwardKL(), inputs.hidden, inputs.weight, inputs.scores, inputs.bias).values
    assert not again.requires_grad
    torch.testing.assert_close(again, values.detach())


def test_two_backward_passes_add_up() -> None:
    inputs = make_inputs()
    values = linear_divergence(ForwardKL(), inputs.hidden, inputs.weight, inputs.scores, inputs.bias).values

    torch.autograd.backward(values.sum(), retain_graph=True)
    assert inputs.weight.grad is not None
    once = inputs.weight.grad.clone()
    torch.autograd.backward(values.sum())
    torch.testing.assert_close(inputs.weight.grad, 2 * once)


def test_without_autograd_head_gradients_are_added_to_and_the_hidden_one_is_written() -> None:
    inputs = make_inputs()
    assert inputs.bias is not None
    expected = linear_divergence(ForwardKL(), inputs.hidden, inputs.weight, inputs.scores, inputs.bias)
    hidden_grad, head_grad, bias_grad = gradients(expected.values, inputs, torch.ones(7, dtype=torch.float64))
    buffers = [torch.full_like(inputs.hidden, 9.0), torch.ones_like(inputs.weight), torch.ones_like(inputs.bias)]

    found = linear_divergence_with_gradients(
        ForwardKL(),
        inputs.hidden,
        inputs.weight,
        inputs.scores,
        inputs.bias,
        hidden_grad=buffers[0],
        head_grad=buffers[1],
        bias_grad=buffers[2],
        block_rows=2,
    )
    torch.testing.assert_close(found.values, expected.values.detach())
    assert not found.values.requires_grad
    torch.testing.assert_close(buffers, [hidden_grad, head_grad + 1.0, bias_grad + 1.0])


def test_a_workspace_bounds_the_blocks_and_changes_nothing() -> None:
    inputs = make_inputs(bias=False)

    def run(**options: Any) -> tuple[Tensor, list[Tensor]]:
        buffers = [torch.zeros_like(inputs.hidden), torch.zeros_like(inputs.weight)]
        out = linear_divergence_with_gradients(
            ForwardKL(),
            inputs.hidden,
            inputs.weight,
            inputs.scores,
            hidden_grad=buffers[0],
            head_grad=buffers[1],
            **options,
        )
        return out.values, buffers

    expected = run()
    workspace = torch.full((3, V), torch.nan, dtype=torch.float64)
    with LargestRows(V) as seen:
        found = run(workspace=workspace)
    assert seen.num_rows <= 3
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(run(workspace=workspace, block_rows=2), expected)


def test_never_more_than_a_block_of_logits() -> None:
    inputs = make_inputs(num_rows=50)

    with LargestRows(V) as seen:
        values = linear_divergence(
            ForwardKL(), inputs.hidden, inputs.weight, inputs.scores, inputs.bias, block_rows=8
        ).values
        torch.autograd.backward(values.sum())
        torch.autograd.backward(
            linear_divergence(ForwardKL(), inputs.hidden, inputs.weight, inputs.scores, block_rows=8).values,
            torch.rand(50, dtype=torch.float64),
        )
    assert 0 < seen.num_rows <= 8


@pytest.mark.parametrize(("hidden_dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_products_are_made_in_the_dtype_of_hidden(hidden_dtype: torch.dtype, tolerance: float) -> None:
    """As under autocast: bf16 hidden states, float32 head with a float32 gradient."""
    inputs = make_inputs(dtype=torch.float32, bias=False)
    hidden = inputs.hidden.detach().to(hidden_dtype).requires_grad_()
    expected = divergence(ForwardKL(), hidden.double() @ inputs.weight.double().t(), inputs.scores).values
    expected_gradients = torch.autograd.grad(expected.sum(), (hidden, inputs.weight))

    values = linear_divergence(ForwardKL(), hidden, inputs.weight, inputs.scores, block_rows=3).values
    found = torch.autograd.grad(values.sum(), (hidden, inputs.weight))
    assert [gradient.dtype for gradient in found] == [hidden_dtype, torch.float32]
    torch.testing.assert_close(values.double(), expected.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found, expected_gradients, rtol=tolerance, atol=tolerance)


def test_wrong_shapes_are_refused() -> None:
    inputs = make_inputs()

    with pytest.raises(ValueError, match=r"hidden must be \[T, 6\], got \(7, 5\)"):
        linear_divergence(ForwardKL(), inputs.hidden[:, :5], inputs.weight, inputs.scores)
    with pytest.raises(ValueError, match=r"head_weight must be \[V, D\] and bias \[V\]"):
        linear_divergence(ForwardKL(), inputs.hidden, inputs.weight, inputs.scores, torch.zeros(3))
    with pytest.raises(ValueError, match="student has 3 rows and the scores have 7"):
        linear_divergence(ForwardKL(), inputs.hidden[:3], inputs.weight, inputs.scores)
    with pytest.raises(ValueError, match=r"head_grad must be \(23, 6\), got \(22, 6\)"):
        linear_divergence_with_gradients(
            ForwardKL(),
            inputs.hidden,
            inputs.weight,
            inputs.scores,
            hidden_grad=torch.empty_like(inputs.hidden),
            head_grad=torch.zeros(V - 1, D, dtype=torch.float64),
        )
