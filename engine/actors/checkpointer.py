"""Writes a policy version to disk together with everything that a resumed run needs to go on from it."""

from __future__ import annotations

from collections.abc import Callable

from engine.actor import Caller
from engine.checkpoint import CheckpointState, CheckpointStore
from engine.ledger import Ledger
from engine.tracing import span
from engine.training.protocol import Trainer


class Checkpointer:
    """Called by the learner between two steps.

    Args:
        make_state: step and weight digest → what ``state.json`` holds.
    """

    def __init__(
        self,
        *,
        store: CheckpointStore,
        ledger: Ledger,
        trainer: Trainer,
        worker: Caller,
        make_state: Callable[[int, str], CheckpointState],
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._trainer = trainer
        self._worker = worker
        self._make_state = make_state

    async def save(self, step: int) -> None:
        """Write version ``step``; returns when it is safe from a power cut.

        Raises:
            RunDirError: the disk is full or read-only; earlier checkpoints are untouched.
        """
        with span("checkpoint.save", step=step) as facts:
            # The ledger first: one that is ahead of the checkpoint is rewound, one that is behind would train twice.
            self._ledger.commit(durable=True)
            digest = await self._worker.call(self._trainer.digest)
            path = await self._worker.call(self._store.save, step, self._trainer.save, self._make_state(step, digest))
            facts.add(path=str(path), digest=digest)
