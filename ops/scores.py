"""What the teacher says of T positions, and which columns of the student's logits that concerns.

    T positions      K teacher's top-k      E ids of the student's      C columns of the support

The columns: the top-k, then the sampled token, then, where an objective asks for them, the student's ids; each id once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TeacherScores:
    """Teacher's view of T positions; all tensors on the device of the student's logits, none with a gradient."""

    top_ids: Tensor
    """[T, K] int: distinct within a row, in any order; −1 pads."""
    top_logprobs: Tensor
    """[T, K] float: nats under the teacher's full softmax. Entries at padded ids are not read."""
    sampled_ids: Tensor
    """[T] int: the token that the student drew; −1: none. May or may not be among the top-k."""
    sampled_logprobs: Tensor
    """[T] float: of ``sampled_ids``."""
    extra_logprobs: Tensor | None = None
    """[T, E] float: of the student's most likely ids, which ``StudentTopKReverseKL`` looks at."""
    extra_ids: Tensor | None = None
    """[T, E] int: those ids, distinct within a row; −1 pads; the first k of them are looked at. None: the E largest of
    the logits that come with these scores, in descending order, as ``logits.topk(E)`` gives them."""

    def __post_init__(self) -> None:
        if self.top_ids.dim() != 2 or self.top_ids.shape != self.top_logprobs.shape:
            raise ValueError(
                f"top_ids and top_logprobs must both be [T, K], got {tuple(self.top_ids.shape)} and "
                f"{tuple(self.top_logprobs.shape)}"
            )
        num_rows = self.top_ids.shape[0]
        if self.sampled_ids.shape != (num_rows,) or self.sampled_logprobs.shape != (num_rows,):
            raise ValueError(
                f"sampled_ids and sampled_logprobs must both be {(num_rows,)} as top_ids has {num_rows} rows, got "
                f"{tuple(self.sampled_ids.shape)} and {tuple(self.sampled_logprobs.shape)}"
            )
        extra = self.extra_logprobs
        if extra is not None and (extra.dim() != 2 or extra.shape[0] != num_rows):
            raise ValueError(f"extra_logprobs must be [{num_rows}, E], got {tuple(extra.shape)}")
        if self.extra_ids is not None and (extra is None or extra.shape != self.extra_ids.shape):
            raise ValueError(
                f"extra_ids and extra_logprobs must both be [T, E], got {tuple(self.extra_ids.shape)} and "
                f"{None if extra is None else tuple(extra.shape)}"
            )
        for name, ids in (("top_ids", self.top_ids), ("sampled_ids", self.sampled_ids), ("extra_ids", self.extra_ids)):
            # Log-probabilities in their place would be a list of nothing but padding: a loss of 0.
            if ids is not None and ids.is_floating_point():
                raise ValueError(f"{name} must be integers, got {ids.dtype}")

    @property
    def num_rows(self) -> int:
        """T."""
        return self.top_ids.shape[0]


NOWHERE = 2**31
"""A place behind all others."""


@dataclass(frozen=True, eq=False)
class Support:
    """The columns of each row."""

    ids: Tensor
    """[T, C] int64, distinct within a row; −1: none, at padding, at log-probability −inf, at an id that a column
    before has already. First the K of the top-k, then one for the sampled token, then the student's."""
    logprobs: Tensor
    """[T, C] float64: the teacher's; −inf where there is no id."""
    sampled_ids: Tensor
    """[T] int64; negative: none."""
    num_top: int
    """K."""
    student_places: Tensor | None = None
    """[T, C] int64: where an id stands among the student's most likely, from 0; ``NOWHERE``: it does not. None where
    nobody asks."""

    @property
    def num_base(self) -> int:
        """K + 1: columns of S."""
        return self.num_top + 1

    def rows(self, start: int, end: int) -> Support:
        return Support(
            ids=self.ids[start:end],
            logprobs=self.logprobs[start:end],
            sampled_ids=self.sampled_ids[start:end],
            num_top=self.num_top,
            student_places=None if self.student_places is None else self.student_places[start:end],
        )

    def with_student(self, student_ids: Tensor, logprobs: Tensor) -> Support:
        """And the student's ids [T, E], with the teacher's log-probabilities of them."""
        wanted = student_ids.long().masked_fill((student_ids < 0) | (logprobs == -torch.inf), -1)
        same = (self.ids.unsqueeze(2) == wanted.unsqueeze(1)) & (wanted >= 0).unsqueeze(1)
        fresh = wanted.masked_fill(same.any(dim=1), -1)
        places = torch.arange(wanted.shape[1], device=wanted.device)
        return Support(
            ids=torch.cat((self.ids, fresh), dim=1),
            logprobs=torch.cat((self.logprobs, logprobs.double().masked_fill(fresh < 0, -torch.inf)), dim=1),
            sampled_ids=self.sampled_ids,
            num_top=self.num_top,
            student_places=torch.cat(
                (
                    torch.where(same, places, NOWHERE).amin(dim=2),
                    places.expand_as(fresh).masked_fill(fresh < 0, NOWHERE),
                ),
                dim=1,
            ),
        )


def support_of(scores: TeacherScores, *, vocab_size: int) -> Support:
    """S of each row.

    Raises:
        ValueError: an id is outside the vocabulary. On CUDA, where to look is to wait, the device asserts it.
    """
    top_ids, sampled_ids = scores.top_ids.long(), scores.sampled_ids.long()
    repeated = (top_ids == sampled_ids.unsqueeze(1)).any(dim=1)
    ids = torch.cat((top_ids, sampled_ids.masked_fill(repeated, -1).unsqueeze(1)), dim=1)
    check_ids(ids, vocab_size)
    logprobs = torch.cat((scores.top_logprobs, scores.sampled_logprobs.unsqueeze(1)), dim=1).double()
    # An id at −inf is left to the tail, as if it were not listed: log(q/p) has no value there.
    absent = (ids < 0) | (logprobs == -torch.inf)
    return Support(
        ids=ids.masked_fill(absent, -1),
        logprobs=logprobs.masked_fill(absent, -torch.inf),
        sampled_ids=sampled_ids,
        num_top=top_ids.shape[1],
    )


def lists_all(scores: TeacherScores, vocab_size: int) -> bool:
    """Whether each row names the whole vocabulary in the order of its ids. One row is looked at where all are the same
    memory (``torch.arange(V).expand(T, V)``). Always no on CUDA, where to look is to wait."""
    ids = scores.top_ids
    if ids.shape[1] != vocab_size or not len(ids) or ids.is_cuda:
        return False
    rows = ids[:1] if ids.stride(0) == 0 else ids
    return bool((rows == torch.arange(vocab_size, device=ids.device)).all())


def check_ids(ids: Tensor, vocab_size: int) -> None:
    if ids.is_cuda:
        torch._assert_async((ids < vocab_size).all(), f"a token id is not below the vocabulary's {vocab_size}")
    elif ids.numel():
        check_largest_id(int(ids.max()), vocab_size)


def check_largest_id(largest: int, vocab_size: int) -> None:
    if largest >= vocab_size:
        raise ValueError(
            f"the scores name token id {largest} and the student's vocabulary has {vocab_size}; "
            "do teacher and student share one tokenizer?"
        )
