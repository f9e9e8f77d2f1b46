"""A teacher's logits in the C kernel, beside plain torch in float64."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

import ops.native_dense
from ops import JSD, ForwardKL, Mixture, ReverseKL, TeacherScores, divergence, linear_divergence
from ops.dense import Dense
from ops.kernels import dense_for
from ops.native_dense import DenseMaker, NativeDense, native_dense
from ops.native_library import load_library
from ops.objectives import Objective, Plain
from ops.shards import Shard
from ops.solve import Conditions
from ops.solved import Problem
from tests.ops.dense_models import BENT, OBJECTIVES, PLAIN, check, make_logits


@pytest.fixture(scope="session")
def make() -> DenseMaker:
    """Not ``native_dense()`` alone: where there is a compiler, these tests may not pass for want of a library."""
    load_library()
    found = native_dense()
    assert found is not None
    return found


@pytest.mark.parametrize("conditions", [PLAIN, BENT], ids=["plain", "bent"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_a_teachers_logits_give_what_plain_torch_makes_of_them(
    make: DenseMaker, objective: Plain, conditions: Conditions
) -> None:
    logits, teacher = make_logits(1500, torch.float32, num_padded=36)

    check(make, objective, conditions, logits, teacher, 1500)


@pytest.mark.parametrize("vocab_size", [1, 15, 16, 17, 511, 513, 1025])
@pytest.mark.parametrize("objective", [ForwardKL(), ReverseKL(), JSD(0.3)], ids=repr)
def test_any_width_will_do_in_either_precision(make: DenseMaker, objective: Plain, vocab_size: int) -> None:
    random = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 3, vocab_size, generator=random).bfloat16()

    check(make, objective, PLAIN, logits, teacher, vocab_size, gradient_rtol=2**-7)
    check(make, objective, PLAIN, logits.float(), teacher, vocab_size)
    check(make, objective, PLAIN, logits, teacher.float(), vocab_size, gradient_rtol=2**-7)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_equal_models_have_no_divergence_and_no_gradient(objective: Plain) -> None:
    logits = 5.0 * torch.randn(4, 700, generator=torch.Generator().manual_seed(1))
    leaf = logits.clone().requires_grad_()

    values = divergence(objective, leaf, logits + 3.0).values
    torch.autograd.backward(values.sum())

    assert leaf.grad is not None
    assert float(values.detach().min()) >= 0.0
    assert float(values.detach().max()) < 1e-9
    assert float(leaf.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_no_numbers_are_not_hidden(objective: Plain) -> None:
    logits, teacher = torch.randn(2, 3, 600, generator=torch.Generator().manual_seed(0))
    logits[0, 599], teacher[1, 0] = torch.nan, torch.inf

    values = divergence(objective, logits, teacher).values

    assert values.isnan().tolist() == [True, True, False]


def test_the_sampled_token_is_looked_up_where_there_is_one(make: DenseMaker) -> None:
    logits, teacher = make_logits(300, torch.float32)
    ids = torch.tensor([0, 299, -1, 17, 0])
    problem = make(ForwardKL(), teacher, Shard(0, 300, 300), BENT, sampled_ids=ids)

    found = problem.solve(logits, 0, 5).metrics["student_logprob"]

    expected = logits.double().log_softmax(1)[torch.arange(5), ids].masked_fill(ids < 0, 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_rows_on_several_threads_are_those_of_one(make: DenseMaker) -> None:
    logits, teacher = torch.randn(2, 64, 40_000, generator=torch.Generator().manual_seed(0))
    num_threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            leaf = logits.clone().requires_grad_()
            out = divergence(JSD(), leaf, teacher)
            torch.autograd.backward(out.values.sum())
            assert leaf.grad is not None
            results.append((out.values.detach(), leaf.grad))
    finally:
        torch.set_num_threads(num_threads)

    assert all(map(torch.equal, *results))


def problem_of(objective: Objective, logits: Tensor, teacher: Tensor) -> Problem:
    num_columns = logits.shape[1]
    shard = Shard(start=0, num_columns=num_columns, vocab_size=num_columns)
    return dense_for(objective, teacher, shard, PLAIN, student_dtype=logits.dtype, block_rows=8)


def test_it_does_what_it_can_and_torch_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, teacher = torch.randn(2, 2, 40)

    assert isinstance(problem_of(ForwardKL(), logits, teacher), NativeDense)
    assert isinstance(problem_of(ForwardKL(), logits.bfloat16(), teacher), NativeDense)
    mixed = Mixture((0.5, ForwardKL()), (0.5, ReverseKL()))
    for objective, z, t in (
        (mixed, logits, teacher),
        (ForwardKL(), logits.double(), teacher),
        (ForwardKL(), logits, teacher.half()),
    ):
        assert not isinstance(problem_of(objective, z, t), NativeDense)
    monkeypatch.setattr(ops.native_dense, "native_library", lambda: None)
    assert native_dense.__wrapped__() is None


def test_a_kernel_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def write(self: Dense, out: Tensor, logits: Tensor, start: int, constants: Tensor, row_scale: Tensor) -> None:
        honest(self, out, logits, start, constants, row_scale * 1.001)

    honest = Dense.write
    monkeypatch.setattr(Dense, "write", write)
    with caplog.at_level(logging.WARNING):
        assert native_dense.__wrapped__() is None
    assert "computes another result" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_teacher_that_changed_before_the_backward_pass_is_noticed(dtype: torch.dtype) -> None:
    logits, teacher = (x.to(dtype) for x in make_logits(300, torch.float32))
    values = divergence(ForwardKL(), logits.requires_grad_(), teacher).values
    teacher += 1.0

    with pytest.raises(RuntimeError, match="modified between forward and backward"):
        torch.autograd.backward(values.sum())


def test_a_list_of_all_ids_in_float32_goes_the_same_way() -> None:
    logits, teacher = torch.randn(2, 5, 90, generator=torch.Generator().manual_seed(0))
    scores = TeacherScores(
        top_ids=torch.arange(90).expand(5, 90),
        top_logprobs=teacher.log_softmax(1),
        sampled_ids=torch.full((5,), 3),
        sampled_logprobs=teacher.log_softmax(1)[:, 3],
    )
    whole, listed = divergence(ReverseKL(), logits, teacher), divergence(ReverseKL(), logits, scores)

    torch.testing.assert_close(listed.values, whole.values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(listed.metrics["student_logprob"], logits.log_softmax(1)[:, 3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_is_nothing_to_the_kernels(other: torch.dtype) -> None:
    """Who loads a model sets it for the whole process meanwhile; what C writes to must keep its size."""
    random = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(40, 24, generator=random), torch.randn(700, 24, generator=random)
    teacher = torch.randn(40, 700, generator=random)
    top = teacher.log_softmax(1).topk(9)
    scores = TeacherScores(
        top_ids=top.indices,
        top_logprobs=top.values,
        sampled_ids=torch.full((40,), 3),
        sampled_logprobs=teacher.log_softmax(1)[:, 3],
    )

    def compute() -> list[Tensor]:
        found = []
        for given in (scores, teacher):
            leaf = hidden.clone().requires_grad_()
            for out in (
                linear_divergence(JSD(), leaf, head, given),
                divergence(JSD(), leaf @ head.t(), given),
            ):
                (gradient,) = torch.autograd.grad(out.values.sum(), leaf)
                found += [out.values.detach(), gradient]
        return found

    expected = compute()
    torch.set_default_dtype(other)
    try:
        found = compute()
    finally:
        torch.set_default_dtype(torch.float32)

    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("is_dense", [True, False])
def test_scores_on_another_device_are_refused_before_their_addresses_are_read(is_dense: bool) -> None:
    teacher, ids = torch.zeros(4, 90, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    scores = TeacherScores(
        top_ids=ids.unsqueeze(1), top_logprobs=teacher[:, :1], sampled_ids=ids, sampled_logprobs=teacher[:, 0]
    )
    given = teacher if is_dense else scores

    with pytest.raises(ValueError, match="scores are on meta and the student on cpu; bring them together"):
        divergence(ForwardKL(), torch.zeros(4, 90), given)
    with pytest.raises(ValueError, match="scores are on meta and the student on cpu; bring them together"):
        linear_divergence(ForwardKL(), torch.zeros(4, 8), torch.zeros(90, 8), given)
