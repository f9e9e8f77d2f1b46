"""The collaborators of a simulated run: flow, schedule and ledger are the real ones, what computes is replaced by what
takes the time of computing, and what would need files is not there."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import msgspec

from engine.actors.weight_syncer import WeightPush
from engine.build.parts import make_flow, num_replicas, sampler_spare
from engine.clock import Clock
from engine.errors import RecipeError
from engine.generation.blank import blank_tokens
from engine.generation.protocol import GenerationRequest
from engine.generation.replay import ReplayGenerator
from engine.ledger import Ledger
from engine.parts import Parts
from engine.recipe import Recipe
from engine.run_dir import RunDir
from engine.schedule import Schedule
from engine.simulate.lengths import Lengths
from engine.streams import stream_key, uniform
from engine.tracing import span
from engine.training.replay import ReplayTrainer
from engine.types import Prompt, SamplingParams
from engine.virtual_time import VirtualWorker
from teacher.replay import ReplayTeacher


class Absent:
    """Stands for what a simulated run does not have, and says so to whoever asks for it."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __getattr__(self, name: str) -> Any:
        raise RecipeError(
            f"a simulated run has no {self._what}: its prompts and answers have lengths and no words; leave the actor "
            "that wants it out of a recipe that is simulated"
        )


class SimulatedParts(msgspec.Struct, frozen=True, kw_only=True):
    """The parts, and those of them whose numbers are read at the end."""

    parts: Parts
    generator: ReplayGenerator
    teacher: ReplayTeacher
    trainer: ReplayTrainer
    aside: Aside
    """What the learner does beside training."""
    push: TimedPush


class Aside:
    """Checkpoints and held-out measurements: the learner waits so long, and nothing else happens."""

    def __init__(self, recipe: Recipe, clock: Clock) -> None:
        self._costs = recipe.replay
        self._clock = clock
        self.busy_s = 0.0

    async def evaluate(self, version: int) -> None:
        await self._take(self._costs.evaluation_s)

    async def save_checkpoint(self, step: int) -> None:
        with span("checkpoint.save", step=step):
            await self._take(self._costs.checkpoint_s)

    async def _take(self, seconds: float) -> None:
        self.busy_s += seconds
        await self._clock.sleep(seconds)


class TimedPush:
    """``WeightPush``, and how long it took."""

    def __init__(self, push: WeightPush, clock: Clock) -> None:
        self._push = push
        self._clock = clock
        self.busy_s = 0.0

    async def __call__(self) -> None:
        began = self._clock.now()
        await self._push()
        self.busy_s += self._clock.now() - began


def simulated_parts(recipe: Recipe, lengths: Lengths, *, ledger: Ledger, folder: Path, clock: Clock) -> SimulatedParts:
    """Make them, within a running virtual loop.

    Args:
        folder: what an actor of the user's may take for the run's folder.
    """
    replay = recipe.replay
    prompts = _Prompts(recipe, lengths)
    schedule = Schedule(flow=make_flow(recipe), ledger=ledger, make_prompt=prompts.make_prompt)
    learner_worker, syncer_worker = VirtualWorker("learner"), VirtualWorker("weight_syncer")
    generator = ReplayGenerator(
        costs=replay, num_slots=recipe.sampler.num_slots, length_of=prompts.length_of, clock=clock
    )
    trainer = ReplayTrainer(costs=replay, spend=learner_worker.spend)
    replicas = replay.num_teachers or num_replicas(recipe)
    teacher = ReplayTeacher(costs=replay, num_replicas=replicas, clock=clock)
    weights_lock = asyncio.Lock()
    aside = Aside(recipe, clock)
    push = TimedPush(
        WeightPush(
            generator=generator,
            trainer=trainer,
            schedule=schedule,
            config=recipe.weights,
            weights_lock=weights_lock,
            worker=syncer_worker,
        ),
        clock,
    )
    parts = Parts(
        recipe=recipe,
        run_dir=RunDir(folder),
        clock=clock,
        tokenizer=cast(Any, Absent("tokenizer")),
        prompts=cast(Any, Absent("prompts")),
        held_out=None,
        ledger=ledger,
        schedule=schedule,
        store=cast(Any, Absent("checkpoints")),
        checkpoint=None,
        generator=generator,
        trainer=trainer,
        teacher=teacher,
        params=SamplingParams(max_new_tokens=recipe.sampler.max_new_tokens),
        learner_worker=learner_worker,
        syncer_worker=syncer_worker,
        sampler_spare=sampler_spare(recipe),
        teacher_concurrency=recipe.teacher.max_in_flight * replicas,
        weights_lock=weights_lock,
        push_weights=push,
        evaluate=None if recipe.evaluation is None else aside.evaluate,
        save_checkpoint=aside.save_checkpoint,
    )
    return SimulatedParts(parts=parts, generator=generator, teacher=teacher, trainer=trainer, aside=aside, push=push)


class _Prompts:
    """Prompt occurrences without words."""

    def __init__(self, recipe: Recipe, lengths: Lengths) -> None:
        self._recipe = recipe
        self._lengths = lengths
        self._latest: tuple[int, tuple[int, ...]] = (-1, ())

    def make_prompt(self, ticket: int) -> Prompt:
        recipe = self._recipe
        prompt_index, sample_index = divmod(ticket, recipe.samples_per_prompt)
        if prompt_index != self._latest[0]:
            self._latest = (prompt_index, blank_tokens(self._lengths.prompt(ticket)))
        key = stream_key("sample", recipe.seed, 0, prompt_index, sample_index)
        share = recipe.data.reference_share
        takes_reference = share > 0 and uniform(stream_key("reference", key)) < share
        return Prompt(
            rollout_id=ticket,
            epoch=0,
            prompt_index=prompt_index,
            sample_index=sample_index,
            token_ids=self._latest[1],
            reference_ids=blank_tokens(self._lengths.answer(ticket)) if takes_reference else None,
            stream_key=key,
        )

    def length_of(self, request: GenerationRequest) -> int:
        return self._lengths.answer(request.request_id)
