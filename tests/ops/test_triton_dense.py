"""A teacher's logits in the Triton kernels, beside plain torch in float64."""

from __future__ import annotations

import pytest
import torch

import ops.kernels
from ops import JSD, ForwardKL, ReverseKL, divergence, linear_divergence
from ops.objectives import Plain
from ops.solve import Conditions
from tests.ops.dense_models import BENT, OBJECTIVES, PLAIN, check, make_logits
from tests.ops.triton_devices import on_each_device

from ops.triton_dense import TritonDense  # isort: skip  # the line above skips this file where there is no triton


@on_each_device
@pytest.mark.parametrize("conditions", [PLAIN, BENT], ids=["plain", "bent"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_a_teachers_logits_give_what_plain_torch_makes_of_them(
    device: str, objective: Plain, conditions: Conditions
) -> None:
    logits, teacher = make_logits(1500, torch.float32, num_padded=36)

    check(TritonDense, objective, conditions, logits, teacher, 1500, device=device)


@on_each_device
@pytest.mark.parametrize("vocab_size", [1, 17, 1024, 1025])
def test_any_width_will_do(device: str, vocab_size: int) -> None:
    random = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 3, vocab_size, generator=random).bfloat16()

    check(TritonDense, ReverseKL(), PLAIN, logits, teacher, vocab_size, device=device, gradient_rtol=2**-7)


@pytest.fixture
def triton_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.kernels, "has_triton", lambda device: True)


@on_each_device
@pytest.mark.usefixtures("triton_everywhere")
def test_the_entry_points_use_the_kernels(device: str) -> None:
    logits, teacher = (x[:2].to(device) for x in make_logits(300, torch.float32))
    exact, leaf = logits.double().requires_grad_(), logits.clone().requires_grad_()
    expected = divergence(JSD(), exact, teacher.double())
    torch.autograd.backward(expected.values.sum())
    assert exact.grad is not None

    found = divergence(JSD(), leaf, teacher)
    torch.autograd.backward(found.values.sum())

    torch.testing.assert_close(found.values.double(), expected.values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad, exact.grad.float(), rtol=1e-5, atol=1e-6)


@on_each_device
@pytest.mark.usefixtures("triton_everywhere")
def test_a_head_meets_a_dense_teacher_block_by_block(device: str) -> None:
    random = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(7, 16, generator=random).to(device), torch.randn(90, 16, generator=random).to(device)
    teacher = torch.randn(7, 90, generator=random).to(device)
    exact = hidden.double().requires_grad_()
    expected = divergence(ForwardKL(), exact @ head.double().t(), teacher.double())
    torch.autograd.backward(expected.values.sum())
    leaf = hidden.clone().requires_grad_()

    found = linear_divergence(ForwardKL(), leaf, head, teacher, block_rows=3)
    torch.autograd.backward(found.values.sum())

    assert leaf.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(found.values.double(), expected.values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_a_teacher_that_changed_before_the_backward_pass_is_noticed() -> None:
    logits, teacher = (x.cuda() for x in make_logits(300, torch.float32))
    values = divergence(ForwardKL(), logits.requires_grad_(), teacher).values
    teacher += 1.0

    with pytest.raises(RuntimeError, match="modified between forward and backward"):
        torch.autograd.backward(values.sum())


@pytest.mark.gpu
@pytest.mark.parametrize("objective", [ForwardKL(), ReverseKL(), JSD()], ids=repr)
def test_a_real_vocabulary(objective: Plain) -> None:
    random = torch.Generator("cuda").manual_seed(0)
    num_rows, width, vocab_size = 512, 151_936, 151_669
    logits, teacher = (
        torch.empty(num_rows, width, dtype=torch.bfloat16, device="cuda").normal_(std=3.0, generator=random)
        for _ in range(2)
    )
    rows = slice(500, num_rows)
    exact = logits[rows].double().requires_grad_()
    expected = divergence(objective, exact, teacher[rows].double(), vocab_size=vocab_size)
    torch.autograd.backward(expected.values.sum())
    assert exact.grad is not None

    found = divergence(objective, logits.requires_grad_(), teacher, vocab_size=vocab_size)
    torch.autograd.backward(found.values.sum())

    assert logits.grad is not None
    torch.testing.assert_close(found.values[rows].double(), expected.values, rtol=1e-5, atol=1e-6)
    for name, metric in found.metrics.items():
        torch.testing.assert_close(metric[rows].double(), expected.metrics[name], rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(logits.grad[rows].double(), exact.grad, rtol=2**-7, atol=1e-7)
