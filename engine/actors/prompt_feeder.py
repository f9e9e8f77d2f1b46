"""Puts one prompt occurrence on its way whenever the schedule has room for one."""

from __future__ import annotations

from engine.actor import Actor
from engine.messages import Control, Drain
from engine.schedule import Schedule
from engine.transport.channel import Sender
from engine.types import Prompt


class PromptFeeder(Actor):
    """The way in.

    Produces: Prompt into ``prompts``
        waits for:     a free slot of the schedule; room in the channel
        unblocked by:  WeightSyncer (a version is live), whoever reports a failed rollout; Sampler.run receiving
    Ends when the schedule needs no more. On ``Drain`` nothing more is admitted.
    """

    def __init__(self, name: str, *, prompts: Sender[Prompt], schedule: Schedule) -> None:
        super().__init__(name)
        self._prompts = prompts
        self._schedule = schedule

    async def run(self) -> None:
        while (prompt := await self._schedule.admit()) is not None:
            await self._prompts.send(prompt)
        self._prompts.close()

    async def control(self, message: Control) -> None:
        if isinstance(message, Drain):
            self._schedule.drain()
