"""Has every rollout scored by the teacher. Retries, hedges and parking are the teacher's (``teacher.pool``); this actor
decides only what happens to a rollout that the teacher will never take."""

from __future__ import annotations

from engine.actor import Actor
from engine.actors.in_flight import work_through
from engine.actors.scoring import score_rollout
from engine.errors import TeacherRefused
from engine.schedule import Schedule
from engine.tracing import span
from engine.transport.channel import Receiver, Sender
from engine.types import Rollout, ScoredRollout
from teacher.protocol import Scores, Teacher
from teacher.replica import MISCONFIGURED


class TeacherProxy(Actor):
    """Keeps a bounded number of rollouts at the teacher.

    Consumes: Rollout from ``rollouts``
        waits for:     a finished rollout; a place at the teacher
        unblocked by:  Sampler.run sending one; the teacher answering
    Produces: ScoredRollout into ``scored``
        waits for:     room in the channel
        unblocked by:  Learner receiving one

    May be restarted: rollouts that it held are scored again, under the same request ids.

    Args:
        alone: deterministic runs: have each rollout scored in a forward pass of its own.
        max_refusals: refusals in a row after which the run fails instead of going through the whole prompt file.
    """

    def __init__(
        self,
        name: str,
        *,
        rollouts: Receiver[Rollout],
        scored: Sender[ScoredRollout[Scores]],
        teacher: Teacher,
        schedule: Schedule,
        top_k: int,
        concurrency: int,
        alone: bool,
        max_refusals: int,
    ) -> None:
        super().__init__(name)
        self._rollouts = rollouts
        self._scored = scored
        self._teacher = teacher
        self._schedule = schedule
        self._top_k = top_k
        self._concurrency = concurrency
        self._alone = alone
        self._max_refusals = max_refusals
        self._refusals = 0
        self._held: dict[int, Rollout] = {}
        """Received and not yet sent on."""

    async def run(self) -> None:
        await work_through(
            self._rollouts,
            lambda rollout: self._score(self._hold(rollout)),
            limit=lambda: self._concurrency,
            again=list(self._held.values()),
            until=self._schedule.wait_finished,
        )
        self._scored.close()

    def _hold(self, rollout: Rollout) -> Rollout:
        self._held[rollout.rollout_id] = rollout
        return rollout

    async def _score(self, rollout: Rollout) -> None:
        try:
            with span("teacher.score", rollout_id=rollout.rollout_id, num_tokens=rollout.num_tokens):
                scored = await score_rollout(self._teacher, rollout, top_k=self._top_k, alone=self._alone)
        except TeacherRefused as refusal:
            self._refusals += 1
            # A wrong token, or a stranger at the teacher's address, is not the rollout's fault.
            if refusal.status in MISCONFIGURED or self._refusals >= self._max_refusals:
                raise
            self._schedule.failed(rollout.rollout_id, f"teacher refused: {refusal}")
        else:
            self._refusals = 0
            await self._scored.send(scored)
        del self._held[rollout.rollout_id]
