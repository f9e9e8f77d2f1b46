"""Where others define the same, we agree with them: PyTorch's ``kl_div`` and TRL's ``generalized_jsd_loss``."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ops import JSD, ForwardKL, Objective, ReverseKL, TeacherScores, divergence
from tests.ops.cases import make_case

BETAS = (0.0, 0.3, 0.5, 1.0)


def trl_generalized_jsd_loss() -> Callable[..., Tensor]:
    """TRL's own function, out of the file that it ships in: importing its trainers takes 20 s and half of the hub."""
    package = importlib.util.find_spec("trl")
    if package is None or package.origin is None:
        pytest.skip("trl is not installed; the extra [dev] brings it")
    path = Path(package.origin).parent / "experimental" / "gkd" / "gkd_trainer.py"
    (function,) = (
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name == "generalized_jsd_loss"
    )
    function.decorator_list.clear()
    names: dict[str, Any] = {"torch": torch, "F": torch.nn.functional}
    exec(compile(ast.Module([function], []), str(path), "exec"), names)
    found: Callable[..., Tensor] = names[function.name]
    return found


def value_and_gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("is_dense", [False, True])
def test_the_whole_list_is_the_generalized_jsd_of_trl(beta: float, temperature: float, is_dense: bool) -> None:
    case = make_case(num_rows=5, vocab_size=30, top_k=30)
    scores: TeacherScores | Tensor = case.teacher if is_dense else case.scores
    theirs = trl_generalized_jsd_loss()

    def trl(logits: Tensor) -> Tensor:
        return theirs(logits, case.teacher, beta=beta, temperature=temperature, reduction="sum")

    def ours(logits: Tensor) -> Tensor:
        return divergence(JSD(beta), logits, scores, temperature=temperature).values.sum()

    found, expected = value_and_gradient(ours, case.logits), value_and_gradient(trl, case.logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_dense", [False, True])
@pytest.mark.parametrize("objective", [ForwardKL(), JSD(0.0), ReverseKL(), JSD(1.0)], ids=repr)
def test_the_whole_list_is_the_kl_div_of_torch(objective: Objective, is_dense: bool) -> None:
    case = make_case(num_rows=5, vocab_size=30, top_k=30)
    scores: TeacherScores | Tensor = case.teacher if is_dense else case.scores

    def expected(logits: Tensor) -> Tensor:
        log_p, log_q = case.teacher, logits.log_softmax(dim=1)
        if objective in (ReverseKL(), JSD(1.0)):
            log_p, log_q = log_q, log_p
        return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=1)

    found = value_and_gradient(lambda logits: divergence(objective, logits, scores).values, case.logits)
    torch.testing.assert_close(found, value_and_gradient(expected, case.logits), rtol=0, atol=1e-12)
