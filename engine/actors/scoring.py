"""One rollout to the teacher and back: how a question to the teacher is worded and what makes it the same question."""

from __future__ import annotations

import hashlib

import numpy as np

from engine.generation.top_ids import top_ids_of
from engine.types import Rollout, ScoredRollout
from teacher.protocol import Scores, Teacher


async def score_rollout(teacher: Teacher, rollout: Rollout, *, top_k: int, alone: bool) -> ScoredRollout[Scores]:
    """Ask for the teacher's top ``top_k`` along the answer, and about the student's own where those were kept;
    ``alone`` and errors as in ``Teacher.score``."""
    scores = await teacher.score(
        prompt_ids=rollout.prompt.token_ids,
        response_ids=rollout.response_ids,
        top_k=top_k,
        extra_ids=top_ids_of(rollout),
        alone=alone,
        request_id=request_id(rollout, top_k),
    )
    return ScoredRollout(rollout=rollout, scores=scores)


def request_id(rollout: Rollout, top_k: int) -> str:
    """Equal for equal questions and for no others: the ticket, and a digest of all ids, because a ticket that is
    sampled again after a crash asks about another answer."""
    digest = hashlib.blake2b(digest_size=12)
    digest.update(np.asarray((top_k, len(rollout.prompt.token_ids)), dtype="<i8").tobytes())
    digest.update(np.asarray(rollout.prompt.token_ids + rollout.response_ids, dtype="<i4").tobytes())
    digest.update(rollout.top_ids)
    return f"{rollout.rollout_id}-{digest.hexdigest()}"
