"""Trains the student, micro-batch by micro-batch, as the schedule hands them out. What a step consists of is decided by
``engine.flow``, how it is computed by the trainer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

import msgspec

from engine.actor import Actor, Caller
from engine.actors.in_flight import first_of
from engine.errors import NonFiniteError
from engine.flow import FinishStep, Stop, Train
from engine.schedule import Schedule
from engine.tracing import log, span
from engine.training.protocol import MicroBatchReport, TokenLosses, Trainer
from engine.transport.channel import Receiver, Sender
from engine.types import Rollout, ScoredRollout
from teacher.protocol import Scores

Evaluate = Callable[[int], Coroutine[Any, Any, None]]
Checkpoint = Callable[[int], Awaitable[None]]
DescribeAnswer = Callable[[ScoredRollout[Scores], TokenLosses, int, int], dict[str, object]]
"""Fields of ``answer.trained`` for an answer, what its tokens cost, the step that trained on it, and its age then."""


class Learner(Actor):
    """The way through.

    Consumes: ScoredRollout from ``scored``
        waits for:     a micro-batch worth of scored rollouts that the step may take
        unblocked by:  TeacherProxy.run sending one
    Produces: policy versions into ``versions``
        waits for:     the previous version being live, before the optimizer changes the weights that travel
        unblocked by:  WeightSyncer

    Args:
        load: brings the trainer to the version that the schedule starts at; called on the worker.
        trainer: used from this actor's one thread (``worker``), except for reads under ``weights_lock``.
        evaluate: measure version v on held-out prompts; called before the first step, after the last, and
            when ``evaluate_every`` divides v (0: never in between).
        measured: versions that an earlier process of this run has measured.
        checkpoint: write version v to disk; called when ``checkpoint_every`` divides v (0: never in between) and at
            the end.
        hold_for_evaluation: admit nothing while measuring (deterministic runs).
        folder: where the rollouts of a step that went wrong are saved.
        describe_answer: tells people of one answer per step; called on the worker. None: they are told nothing.
    """

    def __init__(
        self,
        name: str,
        *,
        scored: Receiver[ScoredRollout[Scores]],
        versions: Sender[int],
        trainer: Trainer,
        worker: Caller,
        load: Callable[[], None],
        schedule: Schedule,
        weights_lock: asyncio.Lock,
        checkpoint: Checkpoint,
        checkpoint_every: int,
        evaluate: Evaluate | None,
        evaluate_every: int,
        measured: Iterable[int],
        last_step: int,
        hold_for_evaluation: bool,
        folder: Path,
        describe_answer: DescribeAnswer | None = None,
    ) -> None:
        super().__init__(name)
        self._scored = scored
        self._versions = versions
        self._trainer = trainer
        self._worker = worker
        self._load = load
        self._schedule = schedule
        self._weights_lock = weights_lock
        self._checkpoint = checkpoint
        self._checkpoint_every = checkpoint_every
        self._evaluate = evaluate
        self._evaluate_every = evaluate_every
        self._measured = set(measured)
        self._last_step = last_step
        self._hold = hold_for_evaluation
        self._folder = folder
        self._describe_answer = describe_answer
        self._pool: dict[int, ScoredRollout[Scores]] = {}
        """Scored and not yet accepted into a step."""
        self._step_rollouts: list[tuple[Rollout, float]] = []
        """Of the step being built, with their losses: what is saved when it goes wrong."""
        self._step_ages: list[int] = []
        self._shown: tuple[ScoredRollout[Scores], TokenLosses, int] | None = None
        """The answer of the step being built that people are told of, and its age."""

    async def run(self) -> None:
        intake = asyncio.get_running_loop().create_task(self._take_in())
        train = asyncio.get_running_loop().create_task(self._train())
        try:
            await asyncio.wait((intake, train), return_when=asyncio.FIRST_EXCEPTION)
            for task in (intake, train):
                if task.done():
                    task.result()
            await train
        finally:
            for task in (intake, train):
                task.cancel()
            await asyncio.gather(intake, train, return_exceptions=True)
        self._versions.close()

    async def start(self) -> None:
        await self._worker.call(self._load)
        if self._hold and self._is_measurement_due(self._schedule.version):
            self._schedule.hold_admission()

    async def stop(self) -> None:
        await self._worker.call(self._trainer.stop)
        await self._worker.close()

    async def _take_in(self) -> None:
        # Taken in at once and chosen from as late as possible: an early answer must not keep a due one waiting behind
        # it. The pool is bounded by the slots of the schedule.
        async for scored in self._scored:
            self._pool[scored.rollout.rollout_id] = scored
            self._schedule.scored(scored.rollout)

    async def _train(self) -> None:
        saved = self._schedule.version
        await self._measure_if_due()
        while True:
            instruction = await self._schedule.next_instruction()
            if isinstance(instruction, Train):
                await self._accumulate(instruction)
                continue
            if isinstance(instruction, FinishStep):
                await self._finish_step()
            # The checkpoint first: a run killed while it measures has lost nothing.
            ends = isinstance(instruction, Stop)
            if self._schedule.version != saved and (ends or self._is_checkpoint_due()):
                saved = self._schedule.version
                await self._checkpoint(saved)
            if ends:
                return
            await self._measure_if_due()

    async def _accumulate(self, instruction: Train) -> None:
        micro_batch = [self._pool.pop(rollout_id) for rollout_id in instruction.rollout_ids]
        step = self._schedule.version + 1
        with span("learner.micro_batch", step=step, rollout_ids=list(instruction.rollout_ids)) as facts:
            try:
                report = await self._worker.call(self._trainer.accumulate, micro_batch)
            except NonFiniteError as error:
                self._step_rollouts += [(scored.rollout, float("nan")) for scored in micro_batch]
                raise self._saved(error, step) from error
            facts.add(**_facts(report))
        self._step_rollouts += [
            (scored.rollout, loss) for scored, loss in zip(micro_batch, report.rollout_losses, strict=True)
        ]
        self._step_ages += instruction.ages
        if report.token_losses is not None and self._shown is None:
            index = report.token_losses.index
            self._shown = (micro_batch[index], report.token_losses, instruction.ages[index])

    async def _finish_step(self) -> None:
        version = self._schedule.version
        await self._schedule.wait_live(version)
        if self._hold and self._is_measurement_due(version + 1):
            self._schedule.hold_admission()
        with span("learner.step", step=version + 1, version=version + 1) as facts:
            async with self._weights_lock:
                try:
                    report = await self._worker.call(self._trainer.finish_step)
                except NonFiniteError as error:
                    raise self._saved(error, version + 1) from error
            facts.add(
                loss=report.loss,
                grad_norm=report.grad_norm,
                lr=report.lr,
                num_rollouts=report.num_rollouts,
                num_tokens=report.num_tokens,
                num_micro_batches=report.num_micro_batches,
                skipped=report.skipped,
                staleness_max=max(self._step_ages),
                staleness_mean=sum(self._step_ages) / len(self._step_ages),
                ages=self._step_ages,
                rollout_ids=[rollout.rollout_id for rollout, _ in self._step_rollouts],
                **report.metrics,
            )
        if report.skipped:
            log.warning("learner.step_skipped", step=report.step, rollouts=str(self._save_rollouts(report.step)))
        self._schedule.step_done()
        await self._versions.send(version + 1)
        self._step_rollouts, self._step_ages = [], []
        await self._tell_answer(version + 1)

    async def _tell_answer(self, step: int) -> None:
        shown, self._shown = self._shown, None
        if shown is None or self._describe_answer is None:
            return
        scored, losses, age = shown
        # Finding the text of 512 tokens takes milliseconds, in which the loop has better things to do.
        fields = await self._worker.call(self._describe_answer, scored, losses, step, age)
        log.info("answer.trained", **fields)

    def _is_checkpoint_due(self) -> bool:
        version, every = self._schedule.version, self._checkpoint_every
        return version == self._last_step or bool(every and version % every == 0)

    def _is_measurement_due(self, version: int) -> bool:
        if self._evaluate is None or version in self._measured:
            return False
        every = self._evaluate_every
        return version in (0, self._last_step) or bool(every and version % every == 0)

    async def _measure_if_due(self) -> None:
        version = self._schedule.version
        if not self._is_measurement_due(version):
            return
        assert self._evaluate is not None
        await self._schedule.wait_live(version)
        # A run that was told to stop and whose grace has ended does not wait for a teacher that is away.
        await first_of(self._evaluate(version), self._schedule.wait_finished())
        self._measured.add(version)
        if self._hold:
            self._schedule.release_admission()

    def _saved(self, error: NonFiniteError, step: int) -> NonFiniteError:
        path = self._save_rollouts(step)
        return NonFiniteError(
            f"step {step}: {error}; the step's rollouts are in {path}; the last checkpoint is untouched. "
            "Lower learner.lr, or set learner.on_nonfinite=skip to leave such steps out"
        )

    def _save_rollouts(self, step: int) -> Path:
        path = self._folder / f"nonfinite_step_{step:06d}.jsonl"
        with path.open("wb") as file:
            for rollout, loss in self._step_rollouts:
                file.write(msgspec.json.encode({"step": step, "loss": loss, "rollout": rollout}) + b"\n")
        return path


def _facts(report: MicroBatchReport) -> dict[str, object]:
    return {
        "num_rollouts": report.num_rollouts,
        "num_tokens": report.num_tokens,
        "num_computed_tokens": report.num_computed_tokens,
        "loss": report.loss_sum / report.num_tokens,
    }
