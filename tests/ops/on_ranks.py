"""What one rank of a group does in the tests of vocabulary shards: it takes its part and returns its part."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ops import Objective, TeacherScores, divergence, linear_divergence, linear_divergence_with_gradients


class Part(NamedTuple):
    values: Tensor
    metrics: dict[str, Tensor]
    gradient: Tensor
    """Of this rank's logits."""
    collectives: dict[str, int]
    """How many of each kind."""


class HeadPart(NamedTuple):
    values: Tensor
    hidden_grad: Tensor
    head_grad: Tensor
    bias_grad: Tensor | None


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0].strip("_")
            self.found[name] = self.found.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def shard_of(whole: Tensor, widths: list[int], group: Any, *, dim: int = -1) -> Tensor:
    """This rank's part, as a tensor of its own."""
    parts: tuple[Tensor, ...] = torch.split(whole, widths, dim=dim)
    return parts[dist.get_rank(group)].clone(memory_format=torch.contiguous_format)


def solve(
    group: Any,
    objective: Objective,
    logits: Tensor,
    scores: TeacherScores | Tensor,
    widths: list[int],
    options: dict[str, Any],
) -> Part:
    """``widths`` of the shards; ``options["tell_start"]``: ranks are told where they begin."""
    options = dict(options)
    if options.pop("tell_start", False):
        options["vocab_start"] = sum(widths[: dist.get_rank(group)])
    mine = shard_of(logits, widths, group).requires_grad_()
    if isinstance(scores, Tensor):
        scores = shard_of(scores, widths, group)
    with Collectives() as forward:
        out = divergence(objective, mine, scores, tp_group=group, **options)
    with Collectives() as backward:
        (gradient,) = torch.autograd.grad(out.values.sum(), mine)
    assert not backward.found
    return Part(out.values.detach(), out.metrics, gradient, forward.found)


def solve_linear(
    group: Any,
    objective: Objective,
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    scores: TeacherScores | Tensor,
    widths: list[int],
    options: dict[str, Any],
) -> HeadPart:
    """``options["autograd"]``: through autograd, or with gradients written by hand."""
    options = dict(options)
    mine = shard_of(head, widths, group, dim=0).requires_grad_()
    my_bias = None if bias is None else shard_of(bias, widths, group, dim=0).requires_grad_()
    if isinstance(scores, Tensor):
        scores = shard_of(scores, widths, group)
    hidden = hidden.clone().requires_grad_()
    if options.pop("autograd", True):
        out = linear_divergence(objective, hidden, mine, scores, my_bias, tp_group=group, **options)
        torch.autograd.backward(out.values.sum())
    else:
        hidden.grad, mine.grad = torch.empty_like(hidden), torch.zeros_like(mine)
        bias_grad = None if my_bias is None else torch.zeros_like(my_bias)
        out = linear_divergence_with_gradients(
            objective,
            hidden,
            mine,
            scores,
            my_bias,
            hidden_grad=hidden.grad,
            head_grad=mine.grad,
            bias_grad=bias_grad,
            tp_group=group,
            **options,
        )
        if my_bias is not None:
            my_bias.grad = bias_grad
    assert hidden.grad is not None
    assert mine.grad is not None
    return HeadPart(out.values.detach(), hidden.grad, mine.grad, None if my_bias is None else my_bias.grad)


def one_rank_has_a_bad_gradient(group: Any, bad_rank: int, scores: TeacherScores, objective: Objective) -> None:
    """Of one row too many there."""
    hidden, head = torch.zeros(scores.num_rows, 3), torch.zeros(5, 3)
    head_grad = torch.zeros(5 + (dist.get_rank(group) == bad_rank), 3)
    linear_divergence_with_gradients(
        objective, hidden, head, scores, hidden_grad=hidden.clone(), head_grad=head_grad, tp_group=group
    )


def one_rank_has_bad_logits(group: Any, bad_rank: int, scores: TeacherScores, objective: Objective) -> None:
    """Too few rows there, in a group that is whole otherwise."""
    num_rows = scores.num_rows - (dist.get_rank(group) == bad_rank)
    divergence(objective, torch.zeros(num_rows, 5), scores, tp_group=group)
