from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ops import ForwardKL, Objective, ReverseKL, TeacherScores, divergence, reference_divergence
from ops.objectives import Tail
from tests.ops.cases import (
    COMPARISONS,
    DIVERGENCES,
    OBJECTIVES,
    PRIMITIVES,
    Case,
    Sampled,
    cases,
    make_case,
    make_scores,
)


def value_and_gradient(
    objective: Objective, logits: Tensor, scores: TeacherScores, *, block_rows: int = 256
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    values = divergence(objective, leaf, scores, block_rows=block_rows).values
    torch.autograd.backward(values.sum())
    assert leaf.grad is not None
    return values.detach(), leaf.grad


def reference(objective: Objective, logits: Tensor, scores: TeacherScores) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().double().requires_grad_()
    values = reference_divergence(objective, leaf, scores)
    torch.autograd.backward(values.sum())
    assert leaf.grad is not None
    return values.detach(), leaf.grad


@given(case=cases(), objective=st.sampled_from(OBJECTIVES))
def test_value_and_gradient_are_those_of_the_definition(case: Case, objective: Objective) -> None:
    values, gradient = value_and_gradient(objective, case.logits, case.scores)

    expected, expected_gradient = reference(objective, case.logits, case.scores)
    size = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-13 * size)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-13 * size)


@given(case=cases(), objective=st.sampled_from(DIVERGENCES))
def test_a_divergence_is_never_negative(case: Case, objective: Objective) -> None:
    values, _ = value_and_gradient(objective, case.logits, case.scores)
    assert (values >= 0).all()

    values, _ = value_and_gradient(objective, case.logits.float(), case.scores)
    assert (values >= 0).all()


@given(case=cases(), objective=st.sampled_from(DIVERGENCES))
def test_it_is_zero_with_zero_gradient_when_the_models_agree(case: Case, objective: Objective) -> None:
    logits = case.teacher + 3.0
    ids = logits.topk(min(3, logits.shape[1]), dim=1).indices
    missing = (0, 3 - ids.shape[1])
    scores = replace(
        case.scores,
        extra_ids=torch.nn.functional.pad(ids, missing, value=-1),
        extra_logprobs=torch.nn.functional.pad(case.teacher.gather(1, ids), missing),
    )
    values, gradient = value_and_gradient(objective, logits, scores)

    # A tail below 2⁻⁵³ drowns in 1 − P, and its noise meets log ratios in the hundreds.
    assert values.max() <= 1e-12
    assert gradient.abs().max() <= 1e-12


@pytest.mark.parametrize("objective", DIVERGENCES, ids=repr)
def test_it_is_positive_as_soon_as_the_models_differ_on_the_support(objective: Objective) -> None:
    case = make_case(top_k=4, sampled="inside")
    logits = case.teacher.clone()
    ids = case.scores.top_ids[:, :3]
    scores = replace(case.scores, extra_ids=ids, extra_logprobs=case.teacher.gather(1, ids))
    logits[torch.arange(len(logits)), ids[:, 0]] += 1e-5

    values, _ = value_and_gradient(objective, logits, scores)
    assert (values > 1e-13).all()


@given(case=cases(), objective=st.sampled_from(OBJECTIVES))
def test_the_gradient_sums_to_zero_over_the_vocabulary(case: Case, objective: Objective) -> None:
    _, gradient = value_and_gradient(objective, case.logits, case.scores)

    assert gradient.sum(dim=1).abs().max() <= 1e-13 * max(1.0, float(gradient.abs().max()))


@pytest.mark.parametrize("objective", PRIMITIVES, ids=repr)
@pytest.mark.parametrize("sampled", ["inside", "outside", "none"])
@pytest.mark.parametrize(("top_k", "num_padded", "num_masked"), [(1, 0, 0), (4, 0, 0), (4, 2, 3), (7, 0, 0), (7, 0, 2)])
def test_the_gradient_is_that_of_the_value(
    objective: Objective, sampled: Sampled, top_k: int, num_padded: int, num_masked: int
) -> None:
    case = make_case(
        num_rows=2, vocab_size=7, top_k=top_k, sampled=sampled, num_padded=num_padded, num_masked=num_masked
    )
    open_columns = case.logits.shape[1] - num_masked

    def values(finite: Tensor) -> Tensor:
        logits = torch.cat((finite, case.logits[:, open_columns:]), dim=1)
        return divergence(objective, logits, case.scores, block_rows=1).values

    assert torch.autograd.gradcheck(values, (case.logits[:, :open_columns].clone().requires_grad_(),))


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "ignore"])
@pytest.mark.parametrize("num_masked", [0, 3])
def test_with_the_whole_vocabulary_listed_it_is_the_dense_divergence(tail: Tail, num_masked: int) -> None:
    case = make_case(vocab_size=50, top_k=50, num_masked=num_masked)
    open_columns = slice(0, 50 - num_masked)
    log_p, log_q = case.teacher[:, open_columns], case.logits.log_softmax(dim=1)[:, open_columns]

    forward, _ = value_and_gradient(ForwardKL(tail), case.logits, case.scores)
    torch.testing.assert_close(forward, (log_p.exp() * (log_p - log_q)).sum(dim=1), rtol=0, atol=1e-12)
    dense = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=1)
    torch.testing.assert_close(forward, dense, rtol=0, atol=1e-12)
    reverse, _ = value_and_gradient(ReverseKL(tail), case.logits, case.scores)
    torch.testing.assert_close(reverse, (log_q.exp() * (log_q - log_p)).sum(dim=1), rtol=0, atol=1e-12)


@given(case=cases(), objective=st.sampled_from(OBJECTIVES), seed=st.integers(0, 1000))
def test_the_order_of_the_top_k_does_not_matter(case: Case, objective: Objective, seed: int) -> None:
    order = torch.randperm(case.scores.top_ids.shape[1], generator=torch.Generator().manual_seed(seed))
    shuffled = replace(
        case.scores, top_ids=case.scores.top_ids[:, order], top_logprobs=case.scores.top_logprobs[:, order]
    )

    expected = value_and_gradient(objective, case.logits, case.scores)
    found = value_and_gradient(objective, case.logits, shuffled)
    # The order of summation moves 1 − P by 1e-16, which is much of a teacher's tail that is nearly 0.
    size = max(1.0, float(expected[0].abs().max()))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * size)


@given(case=cases(), objective=st.sampled_from(OBJECTIVES), temperature=st.sampled_from((1.0, 1.7)))
def test_a_whole_vocabulary_in_the_order_of_its_ids_is_one_like_any_other(
    case: Case, objective: Objective, temperature: float
) -> None:
    """It takes another path: that of the dense divergence."""
    num_ids = case.teacher.shape[1]
    in_order = replace(
        case.scores, top_ids=torch.arange(num_ids).expand(len(case.teacher), num_ids), top_logprobs=case.teacher
    )
    backwards = replace(in_order, top_ids=in_order.top_ids.flip(1), top_logprobs=case.teacher.flip(1))
    one_by_one = replace(in_order, top_ids=in_order.top_ids.contiguous())

    def look(scores: TeacherScores) -> tuple[dict[str, Tensor], Tensor]:
        leaf = case.logits.clone().requires_grad_()
        out = divergence(objective, leaf, scores, temperature=temperature)
        return {"value": out.values, **out.metrics}, torch.autograd.grad(out.values.sum(), leaf)[0]

    expected = look(backwards)
    size = max(1.0, float(expected[0]["value"].detach().abs().max()))
    torch.testing.assert_close(look(in_order), expected, rtol=1e-9, atol=1e-12 * size)
    torch.testing.assert_close(look(one_by_one), look(in_order), rtol=0, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("block_rows", [1, 2, 3, 5])
def test_cutting_the_positions_into_blocks_changes_nothing(objective: Objective, block_rows: int) -> None:
    case = make_case(num_rows=5)

    expected = value_and_gradient(objective, case.logits, case.scores)
    found = value_and_gradient(objective, case.logits, case.scores, block_rows=block_rows)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_padding_the_top_k_changes_nothing_and_leaves_token_0_in_the_tail(objective: Objective) -> None:
    case = make_case(top_k=3, sampled="inside")
    scores = case.scores
    padded = replace(
        scores,
        top_ids=torch.nn.functional.pad(scores.top_ids, (2, 2), value=-1),
        top_logprobs=torch.nn.functional.pad(scores.top_logprobs, (2, 2), value=float("nan")),
    )
    assert not (scores.top_ids == 0).all()

    expected = value_and_gradient(objective, case.logits, scores)
    torch.testing.assert_close(value_and_gradient(objective, case.logits, padded), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("objective", COMPARISONS, ids=repr)
def test_a_sampled_token_in_the_top_k_counts_once(objective: Objective) -> None:
    case = make_case(top_k=4, sampled="inside")
    without = replace(case.scores, sampled_ids=torch.full_like(case.scores.sampled_ids, -1))

    expected = value_and_gradient(objective, case.logits, without)
    torch.testing.assert_close(value_and_gradient(objective, case.logits, case.scores), expected, rtol=0, atol=0)


@pytest.mark.parametrize("objective", COMPARISONS, ids=repr)
def test_a_row_without_any_listed_token_is_zero(objective: Objective) -> None:
    case = make_case(top_k=2, num_padded=2, sampled="none")

    values, gradient = value_and_gradient(objective, case.logits, case.scores)
    assert not values.any()
    assert not gradient.any()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_masked", [0, 3])
def test_extreme_logits_give_finite_numbers(objective: Objective, dtype: torch.dtype, num_masked: int) -> None:
    case = make_case(num_rows=8, vocab_size=9, top_k=3, num_masked=num_masked)
    logits = case.logits.sign().mul(1e4).to(dtype)
    logits[0, : 9 - num_masked] = torch.linspace(-1e4, 1e4, 9 - num_masked, dtype=dtype)
    logits[1, : 9 - num_masked] = torch.linspace(1e4, -1e4, 9 - num_masked, dtype=dtype)

    values, gradient = value_and_gradient(objective, logits, case.scores)
    assert values.isfinite().all()
    assert gradient.isfinite().all()
    size = gradient.abs().amax(dim=1).clamp(min=1.0)
    assert (gradient.sum(dim=1).abs() <= (1e-12 if dtype == torch.float64 else 1e-6) * size).all()
    expected, expected_gradient = reference(objective, logits, case.scores)
    torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("missing_mass", [1e-12, 0.0, -1e-3])
def test_a_teacher_that_names_nearly_all_mass_or_more_gives_finite_numbers(
    objective: Objective, missing_mass: float
) -> None:
    """Rounded log-probabilities may well sum to more than 1."""
    mass = torch.tensor([[0.5, 0.3, 0.2 - missing_mass]], dtype=torch.float64)
    scores = TeacherScores(
        top_ids=torch.tensor([[4, 2, 0]]),
        top_logprobs=mass.log(),
        sampled_ids=torch.tensor([2]),
        sampled_logprobs=mass[:, 1].log(),
        extra_ids=torch.tensor([[2, 0, 4]]),
        extra_logprobs=mass[:, [1, 2, 0]].log(),
    )
    logits = make_case(num_rows=1).logits

    values, gradient = value_and_gradient(objective, logits, scores)
    assert values.isfinite().all()
    assert objective not in DIVERGENCES or (values >= 0).all()
    assert gradient.isfinite().all()
    assert abs(float(gradient.sum())) < 1e-12
    torch.testing.assert_close(values, reference(objective, logits, scores)[0], rtol=1e-9, atol=1e-12)


def test_a_tail_that_underflows_keeps_its_logarithm() -> None:
    """1 − Σ_S q would be 0, or noise, in float32; the log-sum-exp of the tail itself is exact."""
    logits = torch.tensor([[0.0, -300.0, -300.0]])
    scores = TeacherScores(
        top_ids=torch.tensor([[0]]),
        top_logprobs=torch.tensor([[math.log(0.9)]]),
        sampled_ids=torch.tensor([0]),
        sampled_logprobs=torch.tensor([math.log(0.9)]),
    )

    values, gradient = value_and_gradient(ForwardKL(), logits, scores)
    expected = 0.9 * math.log(0.9) + 0.1 * (math.log(0.1) + 300.0 - math.log(2.0))
    assert float(values) == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(gradient, torch.tensor([[0.1, -0.05, -0.05]]))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize(
    ("dtype", "value_error", "gradient_error"), [(torch.float32, 2e-6, 1e-6), (torch.bfloat16, 2e-6, 4e-3)]
)
def test_low_precision_logits_stay_close_to_float64(
    objective: Objective, dtype: torch.dtype, value_error: float, gradient_error: float
) -> None:
    """Of the logits as rounded: the work is done in float32, only a bf16 gradient is rounded again, by up to 2⁻⁹."""
    case = make_case(num_rows=32, vocab_size=1000, top_k=16, scale=3.0)
    logits = case.logits.to(dtype)

    values, gradient = value_and_gradient(objective, logits, case.scores)
    assert values.dtype == torch.float32
    assert gradient.dtype == dtype
    expected, expected_gradient = reference(objective, logits, case.scores)
    torch.testing.assert_close(values.double(), expected, rtol=value_error, atol=value_error)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=gradient_error, atol=gradient_error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_callers_tensors_are_unchanged(dtype: torch.dtype) -> None:
    case = make_case()
    logits = case.logits.to(dtype)
    before = [logits.clone(), case.scores.top_ids.clone(), case.scores.top_logprobs.clone()]

    divergence(ForwardKL(), logits, case.scores)
    torch.autograd.backward(divergence(ForwardKL(), logits.requires_grad_(), case.scores).values.sum())
    for tensor, copy in zip((logits.detach(), case.scores.top_ids, case.scores.top_logprobs), before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_any_gradient_of_the_values_is_passed_on_by_row(objective: Objective) -> None:
    case = make_case(num_rows=4)
    _, unit = value_and_gradient(objective, case.logits, case.scores)
    leaf = case.logits.clone().requires_grad_()
    values = divergence(objective, leaf, case.scores).values
    weights = torch.tensor([2.0, 0.0, -1.0, 0.5], dtype=torch.float64)

    torch.autograd.backward(values, weights, retain_graph=True)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, unit * weights.unsqueeze(1))
    torch.autograd.backward(values, torch.ones_like(weights))
    torch.testing.assert_close(leaf.grad, unit * (weights + 1.0).unsqueeze(1))


def test_metrics_are_what_their_names_say() -> None:
    case = make_case(num_rows=6, vocab_size=40, top_k=8, sampled="outside")
    log_q = case.logits.log_softmax(dim=1)
    top_ids = case.scores.top_ids

    metrics = divergence(ForwardKL(), case.logits, case.scores).metrics
    torch.testing.assert_close(metrics["teacher_mass"], case.teacher.gather(1, top_ids).exp().sum(dim=1))
    torch.testing.assert_close(metrics["student_mass"], log_q.gather(1, top_ids).exp().sum(dim=1))
    students = log_q.topk(8, dim=1).indices
    shared = [len(set(a) & set(b)) / 8 for a, b in zip(students.tolist(), top_ids.tolist(), strict=True)]
    torch.testing.assert_close(metrics["topk_overlap"], torch.tensor(shared, dtype=torch.float64))
    sampled = case.scores.sampled_ids.unsqueeze(1)
    torch.testing.assert_close(metrics["student_logprob"], log_q.gather(1, sampled).squeeze(1))
    for name, log_probs in (("teacher_entropy", case.teacher), ("student_entropy", log_q)):
        full = -(log_probs.exp() * log_probs).sum(dim=1)
        assert (metrics[name] <= full + 1e-12).all()
    whole = divergence(ForwardKL(), case.logits, make_scores(case.teacher, 40)).metrics
    torch.testing.assert_close(whole["student_entropy"], -(log_q.exp() * log_q).sum(dim=1))
    assert not any(metric.requires_grad for metric in metrics.values())


def test_the_overlap_of_a_shorter_list_is_with_as_many_of_the_students() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0, 0.0, 0.0]])
    scores = TeacherScores(
        top_ids=torch.tensor([[0, 2, -1, -1]]),
        top_logprobs=torch.tensor([[-1.0, -1.0, 0.0, 0.0]]),
        sampled_ids=torch.tensor([4]),
        sampled_logprobs=torch.tensor([-5.0]),
    )

    assert float(divergence(ForwardKL(), logits, scores).metrics["topk_overlap"]) == 0.5


@pytest.mark.parametrize("vocab_size", [1000, 1024, 1087])
@pytest.mark.parametrize("ties", [False, True])
def test_the_overlap_is_exact_in_large_vocabularies_too(vocab_size: int, ties: bool) -> None:
    case = make_case(num_rows=20, vocab_size=vocab_size, top_k=3, sampled="outside")
    logits = case.logits.round() if ties else case.logits + case.teacher

    overlap = divergence(ForwardKL(), logits, case.scores).metrics["topk_overlap"]
    threshold = logits.topk(3, dim=1).values[:, -1:]
    shared = (logits.gather(1, case.scores.top_ids) >= threshold).sum(dim=1)
    torch.testing.assert_close(overlap, shared.double() / 3)
    assert 0 < float(overlap.mean()) < 1 or ties


def test_no_positions_give_no_values() -> None:
    scores = TeacherScores(
        top_ids=torch.empty(0, 3, dtype=torch.long),
        top_logprobs=torch.empty(0, 3),
        sampled_ids=torch.empty(0, dtype=torch.long),
        sampled_logprobs=torch.empty(0),
    )
    logits = torch.empty(0, 5, requires_grad=True)

    values = divergence(ForwardKL(), logits, scores).values
    torch.autograd.backward(values.sum())
    assert values.shape == (0,)
    assert logits.grad is not None


@pytest.mark.parametrize("top_ids", [[[5]], [[7]]])
def test_an_id_outside_the_vocabulary_is_refused(top_ids: list[list[int]]) -> None:
    scores = TeacherScores(
        top_ids=torch.tensor(top_ids),
        top_logprobs=torch.zeros(1, 1),
        sampled_ids=torch.tensor([0]),
        sampled_logprobs=torch.zeros(1),
    )

    with pytest.raises(ValueError, match=rf"token id {top_ids[0][0]} and the student's vocabulary has 5"):
        divergence(ForwardKL(), torch.zeros(1, 5), scores)


def test_wrong_shapes_are_refused_with_both_of_them() -> None:
    case = make_case(num_rows=3)

    with pytest.raises(ValueError, match="student has 2 rows and the scores have 3"):
        divergence(ForwardKL(), case.logits[:2], case.scores)
    with pytest.raises(ValueError, match=r"must both be \[T, K\], got \(3, 4\) and \(3, 2\)"):
        replace(case.scores, top_logprobs=case.scores.top_logprobs[:, :2])
    with pytest.raises(ValueError, match="tail must be one of 'bucket', 'renormalise', 'ignore', got 'drop'"):
        ForwardKL(tail="drop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block_rows must be at least 1 row, got 0"):
        divergence(ForwardKL(), case.logits, case.scores, block_rows=0)
