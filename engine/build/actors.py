"""How each actor of the standard graph is made of a run's collaborators."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from engine.actor import Actor
from engine.actors.checkpointer import Checkpointer
from engine.actors.evaluator import Evaluator, HeldOut
from engine.actors.learner import DescribeAnswer, Learner
from engine.actors.prompt_feeder import PromptFeeder
from engine.actors.sampler import Sampler
from engine.actors.teacher_proxy import TeacherProxy
from engine.actors.trained_answer import describe
from engine.actors.weight_syncer import WeightSyncer
from engine.check.scorer import load_scorer
from engine.checkpoint import CheckpointState, package_versions
from engine.evaluations import read_evaluations
from engine.graph import Ports
from engine.parts import Parts
from engine.prompts import PromptRow, PromptSet, Tokenizer
from engine.streams import stream_key
from engine.training.protocol import TokenLosses
from engine.types import Prompt, ScoredRollout
from teacher.protocol import Scores


def make_prompt_feeder(ports: Ports) -> Actor:
    return PromptFeeder(ports.name, prompts=ports.output, schedule=ports.parts.schedule)


def make_sampler(ports: Ports) -> Actor:
    parts = ports.parts
    recipe = parts.recipe
    return Sampler(
        ports.name,
        prompts=ports.input,
        rollouts=ports.output,
        generator=parts.generator,
        schedule=parts.schedule,
        params=parts.params,
        spare=parts.sampler_spare,
        waves=recipe.deterministic,
        load_weights=parts.push_weights,
    )


def make_teacher_proxy(ports: Ports) -> Actor:
    recipe = ports.parts.recipe
    return TeacherProxy(
        ports.name,
        rollouts=ports.input,
        scored=ports.output,
        teacher=ports.parts.teacher,
        schedule=ports.parts.schedule,
        top_k=_top_k(ports.parts, recipe.teacher.top_k),
        concurrency=ports.parts.teacher_concurrency,
        alone=recipe.deterministic,
        max_refusals=max(8, recipe.rollouts_per_step),
    )


def make_learner(ports: Ports) -> Actor:
    parts = ports.parts
    recipe = parts.recipe
    trainer, worker, checkpoint = parts.trainer, parts.learner_worker, parts.checkpoint

    def load() -> None:
        if checkpoint is None:
            trainer.start()
        else:
            trainer.load(checkpoint.path)

    evaluator = None if parts.held_out is None else _evaluator(parts, parts.held_out)
    checkpointer = Checkpointer(
        store=parts.store, ledger=parts.ledger, trainer=trainer, worker=worker, make_state=_state_maker(parts)
    )
    return Learner(
        ports.name,
        scored=ports.input,
        versions=ports.output,
        load=load,
        trainer=trainer,
        worker=worker,
        schedule=parts.schedule,
        weights_lock=parts.weights_lock,
        checkpoint=parts.save_checkpoint or checkpointer.save,
        checkpoint_every=recipe.checkpoint.every_steps,
        evaluate=parts.evaluate or (None if evaluator is None else evaluator.evaluate),
        evaluate_every=0 if recipe.evaluation is None else recipe.evaluation.every_steps,
        # What was measured after the checkpoint was measured on weights that are lost.
        measured=[
            evaluation.version
            for evaluation in read_evaluations(parts.run_dir.evaluations)
            if evaluation.version <= parts.schedule.version
        ],
        last_step=recipe.steps,
        hold_for_evaluation=recipe.deterministic,
        folder=parts.run_dir.path,
        describe_answer=_answer_describer(parts.tokenizer),
    )


def make_weight_syncer(ports: Ports) -> Actor:
    parts = ports.parts
    return WeightSyncer(
        ports.name,
        versions=ports.input,
        schedule=parts.schedule,
        push=parts.push_weights,
        worker=parts.syncer_worker,
    )


def _evaluator(parts: Parts, held_out: PromptSet) -> Evaluator:
    recipe = parts.recipe
    config = recipe.evaluation
    assert config is not None
    worker, trainer, tokenizer = parts.learner_worker, parts.trainer, parts.tokenizer

    async def measure(scored: Sequence[ScoredRollout[Scores]]) -> Any:
        return await worker.call(trainer.evaluate, scored)

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    return Evaluator(
        held_out=_held_out_rows(recipe.seed, config.samples_per_prompt, held_out, decode),
        generator=parts.generator,
        teacher=parts.teacher,
        measure=measure,
        params=msgspec.structs.replace(
            parts.params, max_new_tokens=config.max_new_tokens or recipe.sampler.max_new_tokens, num_top_ids=0
        ),
        top_k=_top_k(parts, config.top_k or recipe.teacher.top_k),
        alone=recipe.deterministic,
        clock=parts.clock,
        num_shown=config.num_shown,
        decode=decode,
        scorer=None if config.scorer is None else load_scorer(config.scorer),
        path=parts.run_dir.evaluations,
    )


def _answer_describer(tokenizer: Tokenizer) -> DescribeAnswer:
    def decode(ids: Sequence[int], without_special: bool) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=without_special))

    def describe_answer(scored: ScoredRollout[Scores], losses: TokenLosses, step: int, age: int) -> dict[str, object]:
        return describe(scored, losses, step=step, age=age, decode=decode)

    return describe_answer


def _held_out_rows(
    seed: int, num_samples: int, rows: Iterable[PromptRow], decode: Callable[[Sequence[int]], str]
) -> list[HeldOut]:
    tickets = itertools.count(-1, -1)
    return [
        HeldOut(
            samples=tuple(
                Prompt(
                    rollout_id=next(tickets),
                    epoch=0,
                    prompt_index=row.prompt_index,
                    sample_index=i,
                    token_ids=row.token_ids,
                    reference_ids=row.reference_ids,
                    stream_key=stream_key("eval", seed, row.prompt_index, i),
                )
                for i in range(num_samples)
            ),
            text=row.text,
            reference_text=None if row.reference_ids is None else decode(row.reference_ids),
        )
        for row in rows
    ]


def _state_maker(parts: Parts) -> Callable[[int, str], CheckpointState]:
    recipe, ledger = parts.recipe, parts.ledger

    def make_state(step: int, digest: str) -> CheckpointState:
        return CheckpointState(
            run_name=recipe.name,
            step=step,
            seed=recipe.seed,
            recipe=msgspec.to_builtins(recipe),
            next_ticket=ledger.next_ticket(),
            ledger_steps=ledger.steps_done,
            weight_digest=digest,
            packages=package_versions(),
        )

    return make_state


def _top_k(parts: Parts, wanted: int) -> int:
    return wanted if parts.most_top_k is None else min(wanted, parts.most_top_k)
