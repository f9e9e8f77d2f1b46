"""Does a replica say the same twice, and the same as the others? Decides what is asked and how far answers are apart.

Fingerprints say that weights and vocabulary are the same. Another build, another dtype, a broken device or, where there
are no fingerprints, another model, show only in the numbers. What follows from a disagreement is the caller's business.
"""

from __future__ import annotations

import uuid

import msgspec
import numpy as np

from teacher.protocol import Scores, Teacher, TeacherInfo

_NUM_PROMPT, _NUM_RESPONSE = 8, 24

_TOP_K = 8
"""Values per token: those that a loss weighs most. Far down a list, half precision is off by more and nobody minds."""


class Disagreement(msgspec.Struct, frozen=True, kw_only=True):
    replica: str
    other: str | None
    """None: the replica itself, a moment before."""
    difference: float
    """Nats (``distance``)."""
    bound: float

    def __str__(self) -> str:
        other = "its own answer a moment before" if self.other is None else f"the answer of {self.other}"
        return (
            f"teacher {self.replica} says of a fixed text what differs from {other} by {self.difference:.3g} nats, "
            f"more than teacher.self_test_bound={self.bound:g}; do all run one build, dtype and model?"
        )


class SelfTest:
    """Asks replicas about one text; what the first one said is what later answers are compared with.

    Args:
        bound: largest distance that is no disagreement, nats.
    """

    def __init__(self, *, bound: float) -> None:
        self._bound = bound
        self._first: tuple[str, Scores] | None = None

    async def examine(self, name: str, teacher: Teacher, info: TeacherInfo) -> Disagreement | None:
        """Ask twice, one after the other.

        Raises:
            TeacherRefused, TeacherUnavailable: what the replica said instead.
        """
        ids = _text(min(info.tokenizer_size, info.vocab_size))
        num_response = min(_NUM_RESPONSE, info.max_length - 1)
        num_prompt = min(_NUM_PROMPT, info.max_length - num_response)

        async def ask() -> Scores:
            return await teacher.score(
                prompt_ids=ids[:num_prompt],
                response_ids=ids[num_prompt : num_prompt + num_response],
                top_k=min(_TOP_K, info.max_top_k, info.vocab_size),
                # Of its own, or the service would give its answer again.
                request_id=uuid.uuid4().hex,
            )

        first, second = await ask(), await ask()
        apart = distance(first, second)
        if not apart <= self._bound:
            return Disagreement(replica=name, other=None, difference=apart, bound=self._bound)
        if self._first is None:
            self._first = name, first
            return None
        other, theirs = self._first
        apart = distance(first, theirs)
        if apart <= self._bound:
            return None
        return Disagreement(replica=name, other=other, difference=apart, bound=self._bound)


def distance(one: Scores, other: Scores) -> float:
    """The least by which some log-probability must differ between two answers to one question, nats.

    Of the most likely ids of each row: where both lists hold an id, the difference of its values; where one does not,
    the other's value can be no larger than its last.
    """
    top_k = min(one.top_ids.shape[1], other.top_ids.shape[1])
    return max(_one_sided(one, other, top_k), _one_sided(other, one, top_k))


def _one_sided(one: Scores, other: Scores, top_k: int) -> float:
    is_same_TKK = one.top_ids[:, :top_k, None] == other.top_ids[:, None, :top_k]
    mine_TK = one.top_logprobs[:, :top_k].astype(np.float64)
    theirs_TK = np.where(is_same_TKK, other.top_logprobs[:, None, :top_k].astype(np.float64), 0.0).sum(axis=2)
    last_T1 = other.top_logprobs[:, top_k - 1 : top_k].astype(np.float64)
    apart_TK = np.where(is_same_TKK.any(axis=2), np.abs(mine_TK - theirs_TK), np.maximum(mine_TK - last_T1, 0.0))
    return float(apart_TK.max())


def _text(num_ids: int) -> list[int]:
    """Spread over the vocabulary, the same for every replica: multiples of a number that is prime to most sizes."""
    return [(1 + 7919 * n) % num_ids for n in range(_NUM_PROMPT + _NUM_RESPONSE)]
