"""What the teacher says of T positions, and which columns of the student's logits that concerns.

T positions      K teacher's top-k      C = K + 1 columns of the support S: the top-k, then the sampled token
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
    """[T, E] float: of ids that the caller named."""

    def __post_init__(self) -> None:
        if self.top_ids.dim() != 2 or self.top_ids.shape != self.top_logprobs.shape:
            raise ValueError(
                f"top_ids and top_logprobs must both be [T, K], got {tuple(self.top_ids.shape)} and "
                f"{tuple(self.top_logprobs.shape)}"
            )
        expected = (self.top_ids.shape[0],)
        if self.sampled_ids.shape != expected or self.sampled_logprobs.shape != expected:
            raise ValueError(
                f"sampled_ids and sampled_logprobs must both be {expected} as top_ids has {expected[0]} rows, got "
                f"{tuple(self.sampled_ids.shape)} and {tuple(self.sampled_logprobs.shape)}"
            )

    @property
    def num_rows(self) -> int:
        """T."""
        return self.top_ids.shape[0]


@dataclass(frozen=True, eq=False)
class Support:
    """S of each row as columns: the top-k, then the sampled token."""

    ids: Tensor
    """[T, C] int64, in range also where ``named`` is False: there the id of a named column of the row (0 if none)."""
    named: Tensor
    """[T, C] bool: False at padding, at log-probability −inf, at a sampled token that the top-k has already."""
    logprobs: Tensor
    """[T, C] float64: the teacher's; −inf where not named."""
    sampled_ids: Tensor
    """[T] int64; −1: none."""

    def rows(self, start: int, end: int) -> Support:
        return Support(
            ids=self.ids[start:end],
            named=self.named[start:end],
            logprobs=self.logprobs[start:end],
            sampled_ids=self.sampled_ids[start:end],
        )


def support_of(scores: TeacherScores, *, num_rows: int, vocab_size: int) -> Support:
    """The support of each row.

    Raises:
        ValueError: the scores have another number of rows, or an id is outside the vocabulary.
    """
    if scores.num_rows != num_rows:
        raise ValueError(f"the student has {num_rows} rows and the scores have {scores.num_rows}; they must agree")
    top_ids = scores.top_ids.long()
    sampled_ids = scores.sampled_ids.long().unsqueeze(1)
    repeated = (top_ids == sampled_ids).any(dim=1, keepdim=True)
    ids = torch.cat((top_ids, sampled_ids.masked_fill(repeated, -1)), dim=1)
    logprobs = torch.cat((scores.top_logprobs.double(), scores.sampled_logprobs.double().unsqueeze(1)), dim=1)
    # An id at −inf is left to the tail, as if it were not listed: log(q/p) has no value there.
    named = (ids >= 0) & (logprobs != -torch.inf)
    if ids.numel() and int(ids.max()) >= vocab_size:
        raise ValueError(
            f"the scores name token id {int(ids.max())} and the student's vocabulary has {vocab_size}; "
            "do teacher and student share one tokenizer?"
        )
    # Padding must point somewhere. It points at a named column of its own row, so that hiding the support from the tail
    # hides nothing else: column 0 as a placeholder would take token 0 out of every padded row.
    anchor = ids.masked_fill(~named, -1).amax(dim=1, keepdim=True).clamp_(min=0)
    return Support(
        ids=torch.where(named, ids, anchor),
        named=named,
        logprobs=logprobs.masked_fill(~named, -torch.inf),
        sampled_ids=sampled_ids.squeeze(1),
    )
