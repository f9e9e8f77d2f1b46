"""Whole objectives on the Triton kernels, behind the entry points that everybody calls."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import ops.kernels
import ops.listed
from ops import (
    ForwardKL,
    Objective,
    StudentTopKReverseKL,
    TeacherScores,
    divergence,
    linear_divergence,
    linear_divergence_with_gradients,
    reference_divergence,
)
from ops.kernels import kernel_for
from ops.rows import RowKernel
from tests.ops.cases import COMPARISONS, OBJECTIVES, make_case
from tests.ops.triton_devices import on_each_device

from ops.triton_rows import Shape, TritonRows  # isort: skip  # the line above skips this file where there is no triton

T, V, K = 8192, 151_936, 64


@pytest.fixture(autouse=True)
def everywhere_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors, too, go to the Triton kernels, in tiles that short rows have several of."""
    shape = Shape(block=128, num_warps=4, ahead=True)

    def chosen(device: torch.device) -> RowKernel:
        return kernel_for(device) if device.type == "cuda" else TritonRows(reduce=shape, expand=shape)

    monkeypatch.setattr(ops.listed, "kernel_for", chosen)
    monkeypatch.setattr(ops.kernels, "has_triton", lambda device: True)


def each_tensor(change: Callable[[Tensor], Tensor], scores: TeacherScores) -> TeacherScores:
    return TeacherScores(
        top_ids=change(scores.top_ids),
        top_logprobs=change(scores.top_logprobs),
        sampled_ids=change(scores.sampled_ids),
        sampled_logprobs=change(scores.sampled_logprobs),
        extra_logprobs=None if scores.extra_logprobs is None else change(scores.extra_logprobs),
        extra_ids=None if scores.extra_ids is None else change(scores.extra_ids),
    )


def on(device: str, scores: TeacherScores) -> TeacherScores:
    return each_tensor(lambda tensor: tensor.to(device), scores)


def value_and_gradient(
    objective: Objective, logits: Tensor, scores: TeacherScores, *, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    values = divergence(objective, leaf, scores, inplace=inplace).values
    torch.autograd.backward(values.sum())
    assert leaf.grad is not None
    return values.detach(), leaf.grad


def rows_of(scores: TeacherScores, rows: Tensor) -> TeacherScores:
    return each_tensor(lambda tensor: tensor[rows], scores)


@on_each_device
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_an_objective_is_that_of_the_definition(device: str, objective: Objective) -> None:
    case = make_case(num_rows=2, vocab_size=300, top_k=6, num_padded=1, num_masked=3, seed=2)
    logits = case.logits.float()
    exact = logits.double().requires_grad_()
    expected = reference_divergence(objective, exact, case.scores)
    torch.autograd.backward(expected.sum())
    assert exact.grad is not None

    with np.errstate(over="ignore", invalid="ignore"):  # the tail's formula at the support, which is written over
        values, gradient = value_and_gradient(objective, logits.to(device), on(device, case.scores))

    torch.testing.assert_close(values.cpu().double(), expected.detach(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient.cpu().double(), exact.grad, rtol=1e-5, atol=1e-6)


@on_each_device
def test_the_metrics_are_those_of_the_other_kernel(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(num_rows=3, vocab_size=500, top_k=16, seed=5)
    logits, scores = case.logits.float().to(device), on(device, case.scores)
    found = divergence(ForwardKL(), logits, scores).metrics

    expected = divergence(ForwardKL(), logits.double(), scores).metrics  # float64 is plain torch's

    for name, metric in found.items():
        torch.testing.assert_close(metric.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.gpu
def test_a_card_gets_the_triton_kernels() -> None:
    assert isinstance(kernel_for(torch.device("cuda")), TritonRows)


def make_large() -> tuple[Tensor, TeacherScores]:
    """[T, V] bfloat16 on a card, of a student that is near the teacher."""
    random = torch.Generator("cuda").manual_seed(0)
    logits = torch.empty(T, V, dtype=torch.bfloat16, device="cuda").normal_(std=2.5, generator=random)
    logits[:, 1000:1100] += 9.0
    noise = torch.rand(T, 200, generator=random, device="cuda")
    ids = noise.argsort(dim=1)[:, :K] + 980
    ids[:, -1] = torch.randint(5000, V, (T,), generator=random, device="cuda")
    logprobs = torch.randn(T, K, generator=random, device="cuda").log_softmax(dim=1) - 0.05
    extra = torch.randn(T, 3, generator=random, device="cuda").log_softmax(dim=1) - 3.0
    ids[::7, 5:9] = -1
    scores = TeacherScores(
        top_ids=ids,
        top_logprobs=logprobs,
        sampled_ids=torch.where(torch.arange(T, device="cuda") % 2 == 0, ids[:, 2], 7),
        sampled_logprobs=torch.where(torch.arange(T, device="cuda") % 2 == 0, logprobs[:, 2], -9.0),
        extra_logprobs=extra,
    )
    return logits, scores


@pytest.mark.gpu
def test_objectives_at_full_size_are_those_in_float64() -> None:
    """All of one test: the tensors are large, and made once. A sample of rows is computed again by plain torch."""
    logits, scores = make_large()
    rows = torch.tensor([0, 1, 2, 7, 4095, 4096, 8190, 8191], device="cuda")
    few, few_scores = logits[rows].double(), rows_of(scores, rows)
    leaf = torch.empty_like(logits).requires_grad_()

    for objective in (*COMPARISONS[::5], *OBJECTIVES[len(COMPARISONS) :]):  # compiling each takes seconds
        expected, expected_gradient = value_and_gradient(objective, few, few_scores)
        for inplace in (False, True):
            leaf.grad = None
            leaf.detach().copy_(logits)
            values = divergence(objective, leaf, scores, inplace=inplace).values
            torch.autograd.backward(values.sum())
            assert leaf.grad is not None
            name = f"{objective!r}, inplace={inplace}"
            torch.testing.assert_close(
                values.detach()[rows].double(), expected, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )
            torch.testing.assert_close(
                leaf.grad[rows].double(),
                expected_gradient,
                rtol=2**-8,
                atol=1e-7,
                msg=lambda m, name=name: f"{name}: {m}",
            )
            assert torch.isfinite(leaf.grad.sum(dim=1)).all(), name
            if not inplace:
                assert torch.equal(leaf.detach(), logits), name


@pytest.mark.gpu
def test_padded_columns_and_a_loss_scale_per_row() -> None:
    logits, scores = make_large()
    logits, scores = logits[:64], rows_of(scores, torch.arange(64, device="cuda"))
    logits[:, 151_669:] = torch.nan
    scale = torch.linspace(-2.0, 3.0, 64, device="cuda")
    exact = logits[:, :151_669].double().requires_grad_()
    torch.autograd.backward(divergence(ForwardKL(), exact, scores).values, scale.double())
    assert exact.grad is not None
    leaf = logits.clone().requires_grad_()

    torch.autograd.backward(divergence(ForwardKL(), leaf, scores, vocab_size=151_669).values, scale)

    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad[:, :151_669].double(), exact.grad, rtol=2**-8, atol=1e-7)
    assert not leaf.grad[:, 151_669:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("objective", [ForwardKL(), StudentTopKReverseKL(3)], ids=repr)
@pytest.mark.parametrize("block_rows", [200, 512])
def test_the_head_fused_on_a_card_is_the_divergence_of_its_product(objective: Objective, block_rows: int) -> None:
    num_rows, hidden_size = 512, 512
    random = torch.Generator("cuda").manual_seed(0)
    _, scores = make_large()
    scores = rows_of(scores, torch.arange(num_rows, device="cuda"))

    def leaf(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=random, device="cuda") * scale).bfloat16().requires_grad_()

    hidden, weight = leaf(num_rows, hidden_size, scale=1.0), leaf(V, hidden_size, scale=0.1)
    logits = (hidden.detach() @ weight.detach().t()).requires_grad_()
    expected = divergence(objective, logits, scores).values
    torch.autograd.backward(expected.sum())
    assert logits.grad is not None

    found = linear_divergence(objective, hidden, weight, scores, block_rows=block_rows).values
    torch.autograd.backward(found.sum())

    assert hidden.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-2, atol=1e-2)  # products of other shapes
    for gradient, exact in (
        (hidden.grad, logits.grad.double() @ weight.detach().double()),
        (weight.grad, logits.grad.double().t() @ hidden.detach().double()),
    ):
        assert float((gradient.double() - exact).norm() / exact.norm()) < 1e-2


@pytest.mark.gpu
def test_the_heads_gradient_is_summed_in_its_own_dtype() -> None:
    """Blocks in bfloat16, their sum in float32: no digit of a block is lost to those before."""
    num_rows, vocab_size, hidden_size = 512, 5000, 64
    random = torch.Generator("cuda").manual_seed(0)
    case = make_case(num_rows=num_rows, vocab_size=vocab_size, top_k=16)
    scores = on("cuda", case.scores)
    hidden = torch.randn(num_rows, hidden_size, generator=random, device="cuda").bfloat16()
    weight = (torch.randn(vocab_size, hidden_size, generator=random, device="cuda") * 0.3).bfloat16()
    found = torch.ones(vocab_size, hidden_size, device="cuda")
    logits = torch.mm(hidden, weight.t()).requires_grad_()
    torch.autograd.backward(divergence(ForwardKL(), logits, scores).values.sum())
    assert logits.grad is not None

    linear_divergence_with_gradients(
        ForwardKL(), hidden, weight, scores, hidden_grad=torch.empty_like(hidden), head_grad=found, block_rows=64
    )

    expected = logits.grad.double().t() @ hidden.double()
    assert float((found.double() - 1.0 - expected).norm() / expected.norm()) < 1e-3
