"""The run's one Flow and one Ledger behind the calls that actors make.

Every fact about a rollout enters here, once: it moves the flow, it is written to the ledger, and whoever waits for it
is woken. This module decides nothing (``engine.flow`` does) and moves no data (channels do). One event loop only.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

from engine.flow import FinishStep, Flow, FlowSnapshot, Stop, Train, Wait
from engine.ledger import Ledger
from engine.tracing import log
from engine.types import Prompt, Rollout


class Schedule:
    """Who may begin, what is trained next, what is done.

    Args:
        flow: the decisions.
        ledger: the record.
        make_prompt: ticket → prompt occurrence, for tickets that were never admitted.
        next_ticket: the first of them.
        again: occurrences that an earlier process of this run admitted and did not train, in ticket order; they go
        first.
    """

    def __init__(
        self,
        *,
        flow: Flow,
        ledger: Ledger,
        make_prompt: Callable[[int], Prompt],
        next_ticket: int = 0,
        again: Iterable[Prompt] = (),
    ) -> None:
        self._flow = flow
        self._ledger = ledger
        self._make_prompt = make_prompt
        self._next_ticket = next_ticket
        self._again = deque(again)
        self._held = 0
        self._finished = asyncio.Event()
        self._admission_changed = asyncio.Event()
        self._training_changed = asyncio.Event()

    # State

    @property
    def version(self) -> int:
        """Steps done."""
        return self._flow.version

    @property
    def live(self) -> int:
        """The version every generator holds."""
        return self._flow.live

    def snapshot(self) -> FlowSnapshot:
        return self._flow.snapshot()

    def is_wave_complete(self, num_received: int) -> bool:
        """Deterministic runs: have all the rollouts that may be sampled together been received?"""
        return self._flow.num_admissible() == 0 and self._flow.snapshot().admitted == num_received

    async def wait_live(self, version: int) -> None:
        """Return when every generator holds ``version`` or a later one."""
        while self._flow.live < version:
            await _next(self._admission_changed)

    async def wait_finished(self) -> None:
        await self._finished.wait()

    # Generation side

    async def admit(self) -> Prompt | None:
        """The next prompt occurrence, as soon as a slot is free; None when no more will be needed.

        Cancelling it leaves the occurrence and the slot where they were.
        """
        while not self._finished.is_set():
            if not self._held and self._flow.num_admissible() > 0:
                if self._again:
                    prompt = self._again.popleft()
                else:
                    prompt = self._make_prompt(self._next_ticket)
                    self._next_ticket += 1
                self._flow.admit(prompt.rollout_id)
                self._ledger.dispatched(prompt)
                log.info(
                    "rollout.dispatched",
                    rollout_id=prompt.rollout_id,
                    epoch=prompt.epoch,
                    prompt_index=prompt.prompt_index,
                    sample_index=prompt.sample_index,
                )
                return prompt
            await _next(self._admission_changed)
        return None

    def hold_admission(self) -> None:
        """Admit nothing until ``release_admission``; holds are counted."""
        self._held += 1

    def release_admission(self) -> None:
        self._held -= 1
        self._notify()

    def begun(self, rollout_id: int, version: int) -> None:
        """Its first token will be sampled under ``version``."""
        self._flow.begin(rollout_id, version=version)

    def requeued(self, prompt: Prompt, reason: str) -> None:
        """What was sampled of it is lost; a sampler has it again and it will begin once more."""
        self._flow.requeue(prompt.rollout_id)
        self._ledger.requeued(prompt.rollout_id, reason)
        self._ledger.dispatched(prompt)
        log.warning("rollout.requeued", rollout_id=prompt.rollout_id, reason=reason)
        self._notify()

    def sampled(self, rollout: Rollout) -> None:
        """Its answer is complete."""
        self._ledger.sampled(rollout)

    def failed(self, rollout_id: int, reason: str) -> None:
        """It will never be trained, and ``reason`` says why; another occurrence is admitted in its place."""
        self._flow.fail(rollout_id)
        self._ledger.failed(rollout_id, reason)
        log.warning("rollout.failed", rollout_id=rollout_id, reason=reason)
        self._notify()

    # Training side

    def scored(self, rollout: Rollout) -> None:
        """It may be trained from now on."""
        self._ledger.scored(rollout.rollout_id)
        self._flow.ready(rollout.rollout_id, num_tokens=len(rollout.prompt.token_ids) + rollout.num_tokens)
        self._training_changed.set()
        # Deterministic runs: the next wave may be admitted when the fate of the last rollout is known.
        if self._flow.num_admissible() > 0:
            self._admission_changed.set()

    async def next_instruction(self) -> Train | FinishStep | Stop:
        """What the learner does next, as soon as there is something to do."""
        while True:
            if self._finished.is_set():
                return Stop()
            instruction = self._flow.next_instruction()
            if isinstance(instruction, Stop):
                if not self._flow.snapshot().draining:
                    self._leave_out_the_rest()
                self.finish()
            if not isinstance(instruction, Wait):
                return instruction
            await _next(self._training_changed)

    def step_done(self) -> None:
        """The optimizer has stepped."""
        trained = self._flow.step_done()
        self._ledger.trained(trained, self._flow.version)
        self._ledger.commit()
        self._notify()

    def weights_live(self, version: int) -> None:
        """Every generator holds ``version``."""
        self._flow.weights_live(version)
        log.info("weights.live", version=version)
        self._notify()

    # The end

    def drain(self) -> None:
        """Admit nothing more; the step being built is finished if what is in flight can fill it."""
        self._flow.drain()
        self._notify()

    def finish(self) -> None:
        """Nothing will be trained any more; everybody who waits is told."""
        self._finished.set()
        self._ledger.commit()
        self._notify()

    def _leave_out_the_rest(self) -> None:
        """The run is complete, and what an earlier process admitted was not all needed: failures it met did not come
        again, or fewer steps are wanted now. A resumed run with more steps takes them up again."""
        while self._again:
            self._ledger.failed(self._again.popleft().rollout_id, "the run was complete without it")

    def _notify(self) -> None:
        self._admission_changed.set()
        self._training_changed.set()


async def _next(change: asyncio.Event) -> None:
    """Wait for the next change. All waiters share an event and each looks again at what it waits for: one replaced on
    every change would be allocated once per rollout."""
    change.clear()
    await change.wait()
