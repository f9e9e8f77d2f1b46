"""A vocabulary cut over ranks gives what one rank gives. Real processes under gloo."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
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
)
from tests.ops import on_ranks
from tests.ops.cases import make_case
from tests.support.ranks import Ranks

EVERYTHING = Mixture(
    (0.5, ForwardKL()), (0.25, SkewKL(tail="ignore")), (1.0, StudentTopKReverseKL(3)), (0.5, SampledReverseKL("k3"))
)
OBJECTIVES: tuple[Objective, ...] = (ForwardKL(), ReverseKL("renormalise"), JSD(0.3), EVERYTHING)
DENSE: tuple[Objective, ...] = (ForwardKL(), ReverseKL(), Mixture((0.5, JSD(0.3)), (0.5, SkewKL(reverse=True))))
VOCAB_SIZE = 24


def shards(num_ranks: int, vocab_size: int) -> list[int]:
    """As torch.tensor_split makes them: the first ones are larger where V is not divisible."""
    return [len(part) for part in torch.arange(vocab_size).tensor_split(num_ranks)]


def scored_case(vocab_size: int, *, num_padded_columns: int = 0) -> tuple[Tensor, TeacherScores]:
    """[6, V + padding] float32 logits, padded with garbage; a teacher that lists local index 0 of every shard."""
    case = make_case(num_rows=6, vocab_size=vocab_size, top_k=5, sampled="outside", num_padded=1, num_masked=2)
    top_ids = case.scores.top_ids.clone()
    for num_ranks in (1, 2, 3, 4):
        starts = torch.tensor(shards(num_ranks, vocab_size)).cumsum(0)[:-1].tolist()
        top_ids[num_ranks, :4] = torch.tensor([0, *starts, 1, 5, 2, 3][:4])
    garbage = torch.tensor([torch.nan, torch.inf, 1e30, -torch.inf]).repeat(6, 1)
    logits = torch.cat((case.logits.float(), garbage[:, :num_padded_columns]), dim=1)
    ids = case.logits.topk(3, dim=1).indices
    scores = replace(
        case.scores,
        top_ids=top_ids,
        top_logprobs=case.teacher.gather(1, top_ids.clamp(min=0)),
        sampled_ids=torch.where((top_ids == case.scores.sampled_ids.unsqueeze(1)).any(1), -1, case.scores.sampled_ids),
        extra_logprobs=case.teacher.gather(1, ids),
        extra_ids=None,
    )
    return logits, scores


def expected(
    objective: Objective, logits: Tensor, scores: TeacherScores | Tensor, **options: Any
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    leaf = logits.clone().requires_grad_()
    out = divergence(objective, leaf, scores, **options)
    (gradient,) = torch.autograd.grad(out.values.sum(), leaf)
    return out.values.detach(), out.metrics, gradient


def check(ranks: Ranks, objective: Objective, logits: Tensor, scores: Any, widths: list[int], **options: Any) -> None:
    vocab_size = options.get("vocab_size")
    values, metrics, gradient = expected(objective, logits, scores, vocab_size=vocab_size)
    parts = ranks.run(on_ranks.solve, len(widths), objective, logits, scores, widths, options)
    for part in parts:
        torch.testing.assert_close(part.values, values, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(part.metrics, metrics, rtol=1e-6, atol=1e-6)
        for name, metric in part.metrics.items():
            assert torch.equal(metric, parts[0].metrics[name])
    found = torch.cat([part.gradient for part in parts], dim=1)
    torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-6)
    assert not found[:, vocab_size:].any() or vocab_size is None


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, VOCAB_SIZE + 1])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_any_number_of_shards_gives_what_one_gives(
    ranks: Ranks, objective: Objective, vocab_size: int, num_ranks: int
) -> None:
    logits, scores = scored_case(vocab_size)

    check(ranks, objective, logits, scores, shards(num_ranks, vocab_size))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_padded_columns_are_not_there_whatever_they_hold(ranks: Ranks, objective: Objective, num_ranks: int) -> None:
    logits, scores = scored_case(VOCAB_SIZE - 4, num_padded_columns=4)

    widths = shards(num_ranks, VOCAB_SIZE)
    check(ranks, objective, logits, scores, widths, vocab_size=VOCAB_SIZE - 4)
    check(ranks, objective, logits, scores, widths, vocab_size=VOCAB_SIZE - 4, inplace=True, block_rows=1)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("objective", DENSE, ids=repr)
def test_a_dense_teacher_is_cut_like_the_student(ranks: Ranks, objective: Objective, num_ranks: int) -> None:
    case = make_case(num_rows=5, vocab_size=VOCAB_SIZE + 1, num_masked=2)
    teacher = case.teacher.float()
    teacher[1:3, :5] = -torch.inf

    check(ranks, objective, case.logits.float(), teacher, shards(num_ranks, VOCAB_SIZE + 1), block_rows=2)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("objective", DENSE, ids=repr)
def test_a_list_of_the_whole_vocabulary_is_cut_like_the_student(
    ranks: Ranks, objective: Objective, num_ranks: int
) -> None:
    logits, scores = scored_case(VOCAB_SIZE - 7, num_padded_columns=4)
    logits = torch.nn.functional.pad(logits, (0, 3), value=torch.nan)  # the last of four shards is padding alone
    teacher = torch.randn(6, VOCAB_SIZE - 7, generator=torch.Generator().manual_seed(1)).log_softmax(1)
    whole = TeacherScores(
        top_ids=torch.arange(VOCAB_SIZE - 7).expand_as(teacher),
        top_logprobs=teacher,
        sampled_ids=scores.sampled_ids,
        sampled_logprobs=teacher[:, 0],
    )

    check(ranks, objective, logits, whole, shards(num_ranks, VOCAB_SIZE), vocab_size=VOCAB_SIZE - 7)


@pytest.mark.parametrize("widths", [[1, 23], [20, 1, 3], [24, 0], [2, 2, 20], [0, 12, 12, 0]])
def test_shards_may_have_any_widths(ranks: Ranks, widths: list[int]) -> None:
    logits, scores = scored_case(VOCAB_SIZE)

    check(ranks, EVERYTHING, logits, scores, widths)


@pytest.mark.parametrize("objective", [ForwardKL(), EVERYTHING], ids=repr)
def test_a_rank_that_is_told_its_start_asks_nobody(ranks: Ranks, objective: Objective) -> None:
    logits, scores = scored_case(VOCAB_SIZE - 4, num_padded_columns=4)
    options = {"vocab_size": VOCAB_SIZE - 4, "tell_start": True}
    values, _, gradient = expected(objective, logits, scores, vocab_size=VOCAB_SIZE - 4)

    parts = ranks.run(on_ranks.solve, 3, objective, logits, scores, [8, 8, 8], options)
    for part in parts:
        torch.testing.assert_close(part.values, values, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat([part.gradient for part in parts], 1), gradient, rtol=1e-6, atol=1e-6)
    assert objective == EVERYTHING or "allgather" not in parts[0].collectives


def test_three_small_all_reduces_forward_and_none_backward(ranks: Ranks) -> None:
    logits, scores = scored_case(VOCAB_SIZE)

    (part, *_) = ranks.run(on_ranks.solve, 2, JSD(), logits, scores, [12, 12], {"block_rows": 1})
    assert part.collectives == {"allreduce": 3, "allgather": 1}
    (part, *_) = ranks.run(on_ranks.solve, 2, EVERYTHING, logits, scores, [12, 12], {})
    assert part.collectives == {"allreduce": 3, "allgather": 3}
    extra_ids = logits.topk(3, dim=1).indices
    named = replace(scores, extra_ids=extra_ids)
    (part, *_) = ranks.run(on_ranks.solve, 2, EVERYTHING, logits, named, [12, 12], {})
    assert part.collectives == {"allreduce": 3, "allgather": 1}


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("autograd", [True, False])
@pytest.mark.parametrize("is_dense", [False, True])
def test_a_head_that_is_cut_gives_what_a_whole_one_gives(
    ranks: Ranks, num_ranks: int, autograd: bool, is_dense: bool
) -> None:
    _, scores = scored_case(VOCAB_SIZE + 1)
    random = torch.Generator().manual_seed(3)
    hidden, head = torch.randn(6, 4, generator=random), torch.randn(VOCAB_SIZE + 1, 4, generator=random)
    bias = torch.randn(VOCAB_SIZE + 1, generator=random)
    objective = DENSE[-1] if is_dense else EVERYTHING
    if not is_dense:
        scores = replace(scores, extra_ids=torch.nn.functional.linear(hidden, head, bias).topk(3, dim=1).indices)
    teacher = torch.randn(6, VOCAB_SIZE + 1, generator=random) if is_dense else scores
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, head, bias)]
    whole = linear_divergence(objective, leaves[0], leaves[1], teacher, leaves[2])
    hidden_grad, head_grad, bias_grad = torch.autograd.grad(whole.values.sum(), leaves)

    widths = shards(num_ranks, VOCAB_SIZE + 1)
    options = {"block_rows": 4, "autograd": autograd}
    parts = ranks.run(on_ranks.solve_linear, num_ranks, objective, hidden, head, bias, teacher, widths, options)
    for part in parts:
        torch.testing.assert_close(part.values, whole.values.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(part.hidden_grad, hidden_grad, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(torch.cat([part.head_grad for part in parts]), head_grad, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(torch.cat([part.bias_grad for part in parts]), bias_grad, rtol=2e-6, atol=2e-6)

    options["reduce_hidden_grad"] = False
    parts = ranks.run(on_ranks.solve_linear, num_ranks, objective, hidden, head, bias, teacher, widths, options)
    summands = torch.stack([part.hidden_grad for part in parts])
    torch.testing.assert_close(summands.sum(dim=0), hidden_grad, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("bad_rank", [0, 1, 2])
def test_no_rank_waits_for_one_that_was_called_with_bad_input(ranks: Ranks, bad_rank: int) -> None:
    scores = make_case(num_rows=4, vocab_size=15).scores

    errors = ranks.outcomes(on_ranks.one_rank_has_bad_logits, 3, bad_rank, scores, ForwardKL())
    assert all(isinstance(error, ValueError) for error in errors), errors
    for rank, error in enumerate(errors):
        expected = "has 3 rows and the scores have 4" if rank == bad_rank else f"rank {bad_rank} of the tp_group was"
        assert expected in str(error)


def test_no_rank_waits_for_one_whose_gradient_has_another_shape(ranks: Ranks) -> None:
    scores = make_case(num_rows=4, vocab_size=15).scores

    errors = ranks.outcomes(on_ranks.one_rank_has_a_bad_gradient, 3, 1, scores, ForwardKL())
    assert "head_grad must be (5, 3), got (6, 3)" in str(errors[1])
    assert all("rank 1 of the tp_group was" in str(errors[rank]) for rank in (0, 2))


def test_an_id_outside_the_vocabulary_is_refused_on_every_rank(ranks: Ranks) -> None:
    logits, scores = scored_case(VOCAB_SIZE)
    beyond = replace(scores, sampled_ids=torch.full_like(scores.sampled_ids, VOCAB_SIZE))

    errors = ranks.outcomes(on_ranks.solve, 2, ForwardKL(), logits, beyond, [12, 12], {})
    assert ["token id 24 and the student's vocabulary has 24" in str(error) for error in errors] == [True, True]


def test_sizes_that_contradict_each_other_are_refused(ranks: Ranks) -> None:
    logits, scores = scored_case(VOCAB_SIZE)

    with pytest.raises(ValueError, match="vocab_size must be from 1 to the 24 columns of all shards, got 25"):
        ranks.run(on_ranks.solve, 2, ForwardKL(), logits, scores, [12, 12], {"vocab_size": 25})
    with pytest.raises(ValueError, match="vocab_start needs vocab_size"):
        ranks.run(on_ranks.solve, 2, ForwardKL(), logits, scores, [12, 12], {"tell_start": True})
    with pytest.raises(ValueError, match="vocab_start=3 needs a tp_group of more than one rank"):
        divergence(ForwardKL(), logits, scores, vocab_start=3)
    with pytest.raises(ValueError, match="vocab_size must be from 1 to the 24 columns of the logits, got 25"):
        divergence(ForwardKL(), logits, scores, vocab_size=25)
