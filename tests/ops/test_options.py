"""What a caller adds to an objective: temperature, weights, a clamp, the sampler's log-probabilities, a place for the
gradient."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ops import (
    JSD,
    ForwardKL,
    Mixture,
    Objective,
    ReverseKL,
    SampledReverseKL,
    SkewKL,
    StudentTopKReverseKL,
    TeacherScores,
    divergence,
    linear_divergence,
    linear_divergence_with_gradients,
    reference_divergence,
)
from ops.objectives import Plain
from tests.ops.cases import COMPARISONS, DIVERGENCES, OBJECTIVES, PRIMITIVES, Case, cases, make_case, make_scores

DENSE = tuple(objective for objective in COMPARISONS if objective.tail == "bucket")
T = 4


def value_and_gradient(
    objective: Objective, logits: Tensor, scores: TeacherScores | Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    values = divergence(objective, leaf, scores, **options).values
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), gradient


def reference(
    objective: Objective, logits: Tensor, scores: TeacherScores | Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().double().requires_grad_()
    values = reference_divergence(objective, leaf, scores, **options)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), gradient


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """Of all kinds, for up to T rows."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return {
        "temperature": draw(st.sampled_from((1.0, 0.5, 2.0))),
        "square_temperature": draw(st.booleans()),
        "behaviour_logprobs": draw(st.sampled_from((None, -3.0 * torch.rand(T, generator=random)))),
        "token_weights": draw(st.sampled_from((None, torch.rand(T, generator=random)))),
        "clamp": draw(st.sampled_from((None, 0.5))),
    }


def of_rows(options: dict[str, Any], num_rows: int) -> dict[str, Any]:
    return {name: each[:num_rows] if isinstance(each, Tensor) else each for name, each in options.items()}


@given(case=cases(), objective=st.sampled_from(OBJECTIVES), options=options())
def test_all_options_together_are_those_of_the_definition(
    case: Case, objective: Objective, options: dict[str, Any]
) -> None:
    options = of_rows(options, len(case.logits))
    values, gradient = value_and_gradient(objective, case.logits, case.scores, **options)

    expected, expected_gradient = reference(objective, case.logits, case.scores, **options)
    # A temperature takes roots of what rounding leaves of 1 − P.
    tolerance = 1e-12 if options["temperature"] <= 1.0 else 1e-7
    size = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=tolerance * size)
    size = max(size, float(expected_gradient.abs().max()))
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=tolerance * size)


@pytest.mark.parametrize("objective", PRIMITIVES, ids=repr)
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_gradient_is_that_of_the_value_at_any_temperature(objective: Objective, temperature: float) -> None:
    case = make_case(num_rows=2, vocab_size=7, top_k=3, num_padded=1)

    def values(logits: Tensor) -> Tensor:
        return divergence(
            objective,
            logits,
            case.scores,
            temperature=temperature,
            square_temperature=True,
            token_weights=torch.tensor([0.5, 3.0]),
        ).values

    assert torch.autograd.gradcheck(values, (case.logits.clone().requires_grad_(),))


@pytest.mark.parametrize("objective", DIVERGENCES, ids=repr)
@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_at_any_temperature_it_is_zero_when_the_models_agree_and_positive_else(
    objective: Objective, temperature: float
) -> None:
    case = make_case(num_rows=5, vocab_size=9, top_k=3)
    scores = make_scores(case.teacher, 3, student=case.teacher)

    values, gradient = value_and_gradient(objective, case.teacher + 1.0, scores, temperature=temperature)
    assert values.abs().max() < 1e-13
    assert gradient.abs().max() < 1e-13
    other = case.teacher + 0.1 * torch.arange(9.0)
    assert (value_and_gradient(objective, other, scores, temperature=temperature)[0] > 1e-6).all()


@pytest.mark.parametrize("objective", COMPARISONS, ids=repr)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("num_masked", [0, 3])
def test_a_list_of_the_whole_vocabulary_is_the_teachers_logits(
    objective: Plain, temperature: float, num_masked: int
) -> None:
    case = make_case(num_rows=5, vocab_size=20, top_k=20, num_masked=num_masked)

    listed = value_and_gradient(objective, case.logits, case.scores, temperature=temperature)
    dense = value_and_gradient(objective, case.logits, case.teacher + 7.0, temperature=temperature, block_rows=2)
    torch.testing.assert_close(listed, dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("objective", [*DENSE, Mixture((0.5, ForwardKL()), (2.0, JSD(0.3)))], ids=repr)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("student_masked", [0, 2])
@pytest.mark.parametrize("teacher_masked", [0, 3])
def test_a_dense_divergence_is_the_definition_with_masked_columns_in_either(
    objective: Objective, temperature: float, student_masked: int, teacher_masked: int
) -> None:
    case = make_case(num_rows=5, vocab_size=12, num_masked=student_masked)
    teacher = case.teacher.clone()
    teacher[:, :teacher_masked] = -torch.inf
    options = {"temperature": temperature, "square_temperature": True}

    found = value_and_gradient(objective, case.logits, teacher, **options)
    torch.testing.assert_close(found, reference(objective, case.logits, teacher, **options), rtol=1e-11, atol=1e-12)
    assert found[1].sum(dim=1).abs().max() < 1e-13


@pytest.mark.parametrize("objective", DENSE, ids=repr)
@pytest.mark.parametrize(
    ("dtype", "value_error", "gradient_error"), [(torch.float32, 3e-6, 1e-6), (torch.bfloat16, 3e-6, 4e-3)]
)
def test_dense_low_precision_logits_stay_close_to_float64(
    objective: Objective, dtype: torch.dtype, value_error: float, gradient_error: float
) -> None:
    case = make_case(num_rows=8, vocab_size=1000, scale=3.0)
    logits, teacher = case.logits.to(dtype), case.teacher.to(dtype)

    values, gradient = value_and_gradient(objective, logits, teacher)
    assert (values.dtype, gradient.dtype) == (torch.float32, dtype)
    expected, expected_gradient = reference(objective, logits, teacher)
    torch.testing.assert_close(values.double(), expected, rtol=value_error, atol=value_error)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=gradient_error, atol=gradient_error)


def test_dense_metrics_are_those_of_a_list_of_everything() -> None:
    case = make_case(num_rows=5, vocab_size=20, top_k=20, sampled="none")

    listed = divergence(ForwardKL(), case.logits, case.scores).metrics
    torch.testing.assert_close(divergence(ForwardKL(), case.logits, case.teacher, temperature=2.0).metrics, listed)


@pytest.mark.parametrize("objective", DENSE, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_extreme_dense_logits_give_finite_numbers(objective: Plain, dtype: torch.dtype, temperature: float) -> None:
    """And rows that one of the models rules out altogether give nothing."""
    random = torch.Generator().manual_seed(2)
    logits, teacher = (1e4 * torch.randn(6, 9, generator=random).sign() for _ in range(2))
    logits[0], teacher[0] = torch.linspace(-1e4, 1e4, 9), torch.linspace(1e4, -1e4, 9)
    teacher[1, :3] = logits[2, 2:4] = logits[3] = teacher[4] = -torch.inf
    logits, teacher = logits.to(dtype), teacher.to(dtype)

    values, gradient = value_and_gradient(objective, logits, teacher, temperature=temperature)
    assert gradient.isfinite().all()
    assert not values[3:5].any()
    assert not gradient[3:5].any()
    expected, expected_gradient = reference(objective, logits, teacher, temperature=temperature)
    torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=1e-6)
    tolerance = 1e-6 if dtype in (torch.float32, torch.float64) else 4e-3
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=tolerance, atol=tolerance)
    assert all(metric.isfinite().all() for metric in divergence(objective, logits, teacher).metrics.values())


def test_a_teacher_that_lists_nothing_is_known_by_the_sampled_token_alone() -> None:
    scores = TeacherScores(
        top_ids=torch.empty(2, 0, dtype=torch.int32),
        top_logprobs=torch.empty(2, 0),
        sampled_ids=torch.tensor([1, -1], dtype=torch.int32),
        sampled_logprobs=torch.tensor([0.25, 0.0]).log(),
    )
    logits = torch.tensor([[1.0, 1.0], [1.0, 2.0]])

    values, _ = value_and_gradient(ForwardKL(), logits, scores)
    torch.testing.assert_close(values, torch.tensor([0.25 * math.log(0.5) + 0.75 * math.log(1.5), 0.0]))


def test_single_tokens_cannot_be_compared_by_logits() -> None:
    case = make_case()

    for objective in (SampledReverseKL(), StudentTopKReverseKL(2), Mixture((1.0, SampledReverseKL("k3")))):
        with pytest.raises(ValueError, match="needs TeacherScores"):
            divergence(objective, case.logits, case.teacher)
    with pytest.raises(ValueError, match=r"teacher's logits must be \(3, 11\) as the student's, got \(3, 10\)"):
        divergence(ForwardKL(), case.logits, case.teacher[:, :10])


def test_square_temperature_keeps_the_size_of_the_gradient() -> None:
    """Hinton et al. 2015: for logits that are small against τ, both gradients are (z − t) / V."""
    case = make_case(vocab_size=8, top_k=8, scale=0.01)

    _, plain = value_and_gradient(ForwardKL(), case.logits, case.teacher)
    _, squared = value_and_gradient(ForwardKL(), case.logits, case.teacher, temperature=2.0, square_temperature=True)
    torch.testing.assert_close(squared, plain, rtol=0.05, atol=1e-5)


@pytest.mark.parametrize("clip_ratio", [None, 1.2])
@pytest.mark.parametrize("has_behaviour", [True, False])
def test_sampled_estimators_are_their_formulas(clip_ratio: float | None, has_behaviour: bool) -> None:
    case = make_case(num_rows=6, vocab_size=8, top_k=2, sampled="any")
    y = case.scores.sampled_ids.unsqueeze(1)
    log_q = case.logits.log_softmax(dim=1)
    log_q_y, log_p_y = log_q.gather(1, y).squeeze(1), case.scores.sampled_logprobs
    behaviour = log_q_y + torch.tensor([0.5, -0.5, 0.0, 2.0, -2.0, 0.1]).double() if has_behaviour else None
    w = torch.ones(6).double() if behaviour is None else (log_q_y - behaviour).exp().clamp(max=clip_ratio or math.inf)
    score = torch.zeros_like(log_q).scatter(1, y, 1.0) - log_q.exp()

    k1 = value_and_gradient(SampledReverseKL("k1", clip_ratio), case.logits, case.scores, behaviour_logprobs=behaviour)
    advantage = w * (log_q_y - log_p_y)
    torch.testing.assert_close(k1, (advantage, advantage.unsqueeze(1) * score))
    k3 = value_and_gradient(SampledReverseKL("k3", clip_ratio), case.logits, case.scores, behaviour_logprobs=behaviour)
    ratio = (log_p_y - log_q_y).exp()
    torch.testing.assert_close(k3, (w * (ratio - 1.0 - ratio.log()), (w * (1.0 - ratio)).unsqueeze(1) * score))
    assert (k3[0] >= 0).all()


def test_over_all_tokens_the_estimators_mean_the_reverse_kl() -> None:
    """k1 in value and gradient; k3 in value, while its gradient is that of the forward KL."""
    V = 6
    case = make_case(num_rows=1, vocab_size=V, top_k=V)
    logits = case.logits.expand(V, V)
    q = logits.softmax(dim=1).diagonal()
    scores = TeacherScores(
        top_ids=torch.full((V, 1), -1),
        top_logprobs=torch.zeros(V, 1),
        sampled_ids=torch.arange(V),
        sampled_logprobs=case.teacher[0],
    )

    value, gradient = value_and_gradient(ReverseKL(), case.logits, case.teacher)
    k1_value, k1_gradient = value_and_gradient(SampledReverseKL("k1"), logits, scores)
    torch.testing.assert_close((q @ k1_value, q @ k1_gradient), (value[0], gradient[0]))
    k3_value, k3_gradient = value_and_gradient(SampledReverseKL("k3"), logits, scores)
    _, forward_gradient = value_and_gradient(ForwardKL(), case.logits, case.teacher)
    torch.testing.assert_close((q @ k3_value, q @ k3_gradient), (value[0], forward_gradient[0]))


def test_a_clamped_token_keeps_its_value_and_loses_its_gradient() -> None:
    case = make_case(num_rows=6)
    values, gradient = value_and_gradient(ForwardKL(), case.logits, case.scores)
    limit = float(values.median())
    weights = torch.arange(1.0, 7.0).double()

    clamped = value_and_gradient(ForwardKL(), case.logits, case.scores, clamp=limit, token_weights=weights)
    is_above = values > limit
    assert is_above.any()
    torch.testing.assert_close(clamped[0], values.clamp(max=limit) * weights)
    torch.testing.assert_close(clamped[1], gradient.masked_fill(is_above.unsqueeze(1), 0.0) * weights.unsqueeze(1))


def test_the_ids_of_the_student_are_its_largest_unless_they_are_named() -> None:
    case = make_case(num_rows=5, vocab_size=12, top_k=3)
    ids = case.logits.topk(4, dim=1).indices
    logprobs = case.teacher.gather(1, ids)
    implied = replace(case.scores, extra_ids=None, extra_logprobs=logprobs)
    named = replace(case.scores, extra_ids=ids.flip(1), extra_logprobs=logprobs.flip(1))
    padded = torch.nn.functional.pad(case.logits, (0, 3), value=torch.inf)

    expected = value_and_gradient(StudentTopKReverseKL(4), case.logits, named)
    torch.testing.assert_close(value_and_gradient(StudentTopKReverseKL(4), case.logits, implied), expected)
    values, gradient = value_and_gradient(StudentTopKReverseKL(4), padded, implied, vocab_size=12)
    torch.testing.assert_close((values, gradient[:, :12]), expected)
    assert not gradient[:, 12:].any()
    log_q, q = case.logits.log_softmax(1).gather(1, ids), case.logits.softmax(1).gather(1, ids)
    rest_q, rest_p = 1.0 - q.sum(1), 1.0 - logprobs.exp().sum(1)
    value = (q * (log_q - logprobs)).sum(1) + rest_q * (rest_q / rest_p).log()
    torch.testing.assert_close(expected[0], value)


def test_what_an_objective_needs_and_is_not_given_is_said() -> None:
    case = make_case(num_rows=3)

    with pytest.raises(ValueError, match=r"StudentTopKReverseKL\(k=4\) needs .* got \(3, 3\)"):
        divergence(StudentTopKReverseKL(4), case.logits, case.scores)
    with pytest.raises(ValueError, match="extra_ids and extra_logprobs must both be"):
        replace(case.scores, extra_logprobs=None, extra_ids=torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"token_weights must be \(3,\) as the student has 3 rows, got \(2,\)"):
        divergence(ForwardKL(), case.logits, case.scores, token_weights=torch.ones(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JSD(1.5), r"beta must lie in \[0, 1\], got 1.5"),
        (lambda: JSD(math.nan), r"beta must lie in \[0, 1\], got nan"),
        (lambda: SkewKL(1.0), r"alpha must lie in \[0, 1\), got 1.0"),
        (lambda: SkewKL(tail="none"), "tail must be one of"),  # type: ignore[arg-type]
        (lambda: StudentTopKReverseKL(0), "k must be at least 1 id, got 0"),
        (lambda: SampledReverseKL("k2"), "estimator must be 'k1' or 'k3', got 'k2'"),  # type: ignore[arg-type]
        (lambda: SampledReverseKL(clip_ratio=0.0), "clip_ratio must be above 0"),
        (lambda: Mixture(), "at least one"),
        (lambda: Mixture((-1.0, ForwardKL())), "finite and not negative, got -1.0"),
        (lambda: Mixture(ForwardKL()), "made of"),  # type: ignore[arg-type]
        (lambda: divergence(ForwardKL(), torch.zeros(1, 2), torch.zeros(1, 2), temperature=0.0), "temperature must be"),
        (lambda: divergence(ForwardKL(), torch.zeros(1, 2), torch.zeros(1, 2), clamp=0.0), "clamp must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_dense", [False, True])
def test_the_gradient_may_take_the_place_of_the_logits(dtype: torch.dtype, is_dense: bool) -> None:
    case = make_case(num_rows=5)
    scores = case.teacher.to(dtype) if is_dense else case.scores
    weights = torch.tensor([1.0, 2.0, 0.0, -1.0, 0.3], dtype=torch.float64 if dtype == torch.float64 else torch.float32)

    def gradient(inplace: bool) -> tuple[Tensor, Tensor]:
        leaf = case.logits.to(dtype).requires_grad_()
        logits = leaf * 1.0
        values = divergence(JSD(), logits, scores, inplace=inplace, block_rows=2).values
        torch.autograd.backward(values, weights)
        assert leaf.grad is not None
        assert torch.equal(logits.detach(), leaf.grad) == inplace
        return values.detach(), leaf.grad

    torch.testing.assert_close(gradient(inplace=True), gradient(inplace=False), rtol=0, atol=0)


def test_logits_that_were_overwritten_are_an_error_for_whoever_needs_them() -> None:
    case = make_case()
    logits = case.logits.clone().requires_grad_().exp()  # the gradient of exp needs its result
    values = divergence(ForwardKL(), logits, case.scores, inplace=True).values
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(values.sum())

    logits = case.logits.clone().requires_grad_() * 1.0
    values = divergence(ForwardKL(), logits, case.scores, inplace=True).values
    with torch.no_grad():
        logits.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(values.sum())


def test_a_kept_graph_gives_the_gradient_again_and_says_so_where_it_cannot() -> None:
    case = make_case()
    leaf = case.logits.clone().requires_grad_()
    values = divergence(ForwardKL(), leaf * 1.0, case.scores).values
    (once,) = torch.autograd.grad(values.sum(), leaf, retain_graph=True)
    (twice,) = torch.autograd.grad(2.0 * values.sum(), leaf)
    torch.testing.assert_close(twice, 2.0 * once)

    values = divergence(ForwardKL(), leaf * 1.0, case.scores, inplace=True).values
    (found,) = torch.autograd.grad(values.sum(), leaf, retain_graph=True)
    torch.testing.assert_close(found, once)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(values.sum(), leaf)


def test_without_a_gradient_to_compute_nothing_is_overwritten() -> None:
    case = make_case()
    logits = case.logits.clone()

    divergence(ForwardKL(), logits, case.scores, inplace=True)
    assert torch.equal(logits, case.logits)
    with pytest.raises(ValueError, match="inplace=True needs logits whose rows are contiguous"):
        divergence(ForwardKL(), logits.t(), case.teacher.t(), inplace=True)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("is_by_hand", [False, True])
def test_options_are_those_of_the_divergence_through_a_head_too(objective: Objective, is_by_hand: bool) -> None:
    random = torch.Generator().manual_seed(1)
    case = make_case(num_rows=T, vocab_size=11)
    hidden = torch.randn(T, 3, generator=random, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 3, generator=random, dtype=torch.float64, requires_grad=True)
    ids = (hidden @ head.t()).detach().topk(3, dim=1).indices
    scores = replace(case.scores, extra_ids=ids, extra_logprobs=case.teacher.gather(1, ids))
    options: dict[str, Any] = {
        "temperature": 2.0,
        "square_temperature": True,
        "behaviour_logprobs": torch.full((T,), -2.0),
        "token_weights": torch.tensor([1.0, 0.5, 0.0, 2.0]),
        "clamp": 1.0,
        "vocab_size": 11,
    }
    padded = torch.cat((head, head.new_full((2, 3), torch.nan)))
    expected = divergence(objective, hidden @ head.t(), scores, **options).values
    hidden_grad, head_grad = torch.autograd.grad(expected.sum(), (hidden, head))

    found: tuple[Tensor, ...]
    if is_by_hand:
        found = torch.empty_like(hidden), torch.zeros_like(padded)
        values = linear_divergence_with_gradients(
            objective, hidden, padded, scores, hidden_grad=found[0], head_grad=found[1], block_rows=3, **options
        ).values
    else:
        values = linear_divergence(objective, hidden, padded, scores, block_rows=3, **options).values
        found = torch.autograd.grad(values.sum(), (hidden, padded))
    torch.testing.assert_close(values.detach(), expected.detach())
    torch.testing.assert_close(found, (hidden_grad, torch.nn.functional.pad(head_grad, (0, 0, 0, 2))))


def test_a_head_meets_a_dense_teacher() -> None:
    random = torch.Generator().manual_seed(1)
    hidden, head = (torch.randn(n, 3, generator=random, dtype=torch.float64, requires_grad=True) for n in (T, 11))
    teacher = make_case(num_rows=T, vocab_size=11).teacher
    expected = divergence(JSD(), hidden @ head.t(), teacher).values

    values = linear_divergence(JSD(), hidden, head, teacher, block_rows=3).values
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(
        torch.autograd.grad(values.sum(), (hidden, head)), torch.autograd.grad(expected.sum(), (hidden, head))
    )


def test_ids_and_log_probabilities_that_changed_places_are_refused() -> None:
    scores = make_case().scores

    with pytest.raises(ValueError, match="top_ids must be integers"):
        replace(scores, top_ids=scores.top_logprobs, top_logprobs=scores.top_ids)
    with pytest.raises(ValueError, match="sampled_ids must be integers"):
        replace(scores, sampled_ids=scores.sampled_logprobs, sampled_logprobs=scores.sampled_ids)


@pytest.mark.parametrize("objective", ["forward_kl", ForwardKL])
def test_what_is_no_objective_is_refused(objective: Any) -> None:
    case = make_case()

    with pytest.raises(ValueError, match=r"must be one of ops, as ForwardKL\(\)"):
        divergence(objective, case.logits, case.scores)


def test_tensors_elsewhere_than_on_the_default_device_are_none_the_worse() -> None:
    case = make_case(top_k=11)
    scores = replace(
        case.scores,
        top_ids=torch.arange(11).expand(3, 11),
        top_logprobs=case.teacher,
        extra_ids=case.scores.top_ids[:, :3],
    )
    for objective in OBJECTIVES:
        for teacher in (scores, case.scores):
            expected = value_and_gradient(objective, case.logits, teacher), reference(objective, case.logits, teacher)
            with torch.device("meta"):
                found = value_and_gradient(objective, case.logits, teacher), reference(objective, case.logits, teacher)
            torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)
