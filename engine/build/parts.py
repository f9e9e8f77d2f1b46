"""A run's collaborators, made of its recipe and what the checks have loaded: ledger, schedule, generator, trainer,
teacher. Heavy ones load when their actor starts."""

from __future__ import annotations

import asyncio

import msgspec

from engine.actor import Worker
from engine.actors.weight_probe import WeightProbe
from engine.actors.weight_syncer import WeightPush
from engine.check.asked import longest, sampling_params, wanted_top_k
from engine.check.folder import ledger_identity
from engine.check.look import Inputs
from engine.checkpoint import Checkpoint, CheckpointStore
from engine.clock import Clock
from engine.flow import Flow
from engine.generation.protocol import Generator
from engine.ledger import Ledger
from engine.parts import Parts
from engine.prompts import PromptSet, PromptSource
from engine.recipe import Recipe, RemoteTeacher
from engine.run_dir import RunDir
from engine.schedule import Schedule
from engine.tracing import log
from engine.training.protocol import Trainer
from teacher.protocol import Teacher


def make_parts(recipe: Recipe, inputs: Inputs, *, run_dir: RunDir, resume: bool, clock: Clock) -> Parts:
    """Open the ledger, find the checkpoint, and make the collaborators; heavy ones load when their actor starts.

    Raises:
        UserError: the ledger or the checkpoints cannot be used.
    """
    ledger = Ledger.open(
        run_dir.ledger,
        run_name=recipe.name,
        seed=recipe.seed,
        identity=ledger_identity(recipe, inputs.prompts),
    )
    try:
        store = CheckpointStore(run_dir.checkpoints, keep=recipe.checkpoint.keep)
        store.recover()
        checkpoint = store.latest() if resume else None
        schedule = _schedule(recipe, inputs.prompts, ledger, checkpoint)
    except BaseException:
        ledger.close()
        raise
    learner_worker, syncer_worker = Worker("learner"), Worker("weight_syncer")
    generator, trainer, weights_lock = _generator(recipe), _trainer(recipe, run_dir), asyncio.Lock()
    return Parts(
        recipe=recipe,
        run_dir=run_dir,
        clock=clock,
        tokenizer=inputs.student.tokenizer,
        prompts=inputs.prompts,
        held_out=inputs.held_out,
        ledger=ledger,
        schedule=schedule,
        store=store,
        checkpoint=checkpoint,
        generator=generator,
        trainer=trainer,
        teacher=_teacher(recipe, inputs),
        params=sampling_params(recipe, stop_ids=inputs.student.stop_ids),
        learner_worker=learner_worker,
        syncer_worker=syncer_worker,
        sampler_spare=sampler_spare(recipe),
        teacher_concurrency=recipe.teacher.max_in_flight * num_replicas(recipe),
        most_top_k=inputs.most_top_k,
        weights_lock=weights_lock,
        push_weights=WeightPush(
            generator=generator,
            trainer=trainer,
            schedule=schedule,
            config=recipe.weights,
            weights_lock=weights_lock,
            worker=syncer_worker,
            probe=_weight_probe(recipe, inputs, generator, trainer, learner_worker),
        ),
    )


def sampler_spare(recipe: Recipe) -> int:
    """Answers under way beyond what the generator decodes: a finished slot is refilled at the next decode step."""
    return max(1, recipe.samples_per_prompt)


def num_replicas(recipe: Recipe) -> int:
    """Of the teacher."""
    return len(recipe.teacher.urls) if isinstance(recipe.teacher, RemoteTeacher) else 1


def _schedule(recipe: Recipe, prompts: PromptSet, ledger: Ledger, checkpoint: Checkpoint | None) -> Schedule:
    step = 0 if checkpoint is None else checkpoint.step
    source = PromptSource(
        prompts,
        samples_per_prompt=recipe.samples_per_prompt,
        seed=recipe.seed,
        shuffle=recipe.data.shuffle,
        reference_share=recipe.data.reference_share,
    )
    again = ledger.rewind(step)
    return Schedule(
        flow=make_flow(recipe, step=step),
        ledger=ledger,
        make_prompt=source.make_prompt,
        next_ticket=ledger.next_ticket(),
        again=[source.make_prompt(occurrence.rollout_id) for occurrence in again],
    )


def make_flow(recipe: Recipe, *, step: int = 0) -> Flow:
    """The decisions of a run of ``recipe`` that begins after ``step``."""
    return Flow(
        rollouts_per_step=recipe.rollouts_per_step,
        max_staleness=recipe.max_staleness,
        num_steps=max(recipe.steps, step),
        micro_batch_tokens=recipe.learner.tokens_at_a_time,
        micro_batch_rollouts=recipe.learner.micro_batch_rollouts,
        version=step,
        min_wave=recipe.sampler.min_wave,
        by_ticket=recipe.deterministic,
    )


def _generator(recipe: Recipe) -> Generator:
    if recipe.sampler.backend == "vllm":
        from engine.generation.vllm import VllmGenerator
        from engine.generation.vllm_fleet import VllmFleet

        make = VllmGenerator if recipe.sampler.vllm.num_engines == 1 else VllmFleet
        return make(
            config=recipe.sampler,
            student=recipe.student,
            max_length=longest(recipe),
            lora=recipe.learner.lora,
            weights=recipe.weights,
            weights_device=recipe.learner.device,
        )
    from engine.generation.hf import HFGenerator

    return HFGenerator(config=recipe.sampler, student=recipe.student)


def _weight_probe(
    recipe: Recipe, inputs: Inputs, generator: Generator, trainer: Trainer, worker: Worker
) -> WeightProbe | None:
    if recipe.weights.verify_every == 0:
        return None
    from engine.generation.vllm import VllmGenerator
    from engine.generation.vllm_fleet import VllmFleet

    assert isinstance(generator, VllmGenerator | VllmFleet), "the recipe allows no other"
    return WeightProbe(
        generator=generator,
        learner=trainer.score,
        worker=worker,
        # With one token more, a prompt of a single one can be compared, too.
        token_ids=(*next(iter(inputs.prompts)).token_ids, *inputs.student.stop_ids[:1]),
        every=recipe.weights.verify_every,
        bound=recipe.weights.verify_bound,
    )


def _trainer(recipe: Recipe, run_dir: RunDir) -> Trainer:
    if recipe.learner.backend == "megatron":
        from engine.training.megatron import MegatronTrainer

        return MegatronTrainer(
            config=recipe.learner,
            student=recipe.student,
            objective=recipe.objective,
            steps=recipe.steps,
            rollouts_per_step=recipe.rollouts_per_step,
            seed=recipe.seed,
            folder=run_dir.ranks,
        )
    from engine.training.hf import HFTrainer

    return HFTrainer(
        config=recipe.learner,
        student=recipe.student,
        objective=recipe.objective,
        steps=recipe.steps,
        seed=recipe.seed,
        exports_adapter=recipe.sampler.backend == "vllm",
    )


def _teacher(recipe: Recipe, inputs: Inputs) -> Teacher:
    if isinstance(config := recipe.teacher, RemoteTeacher):
        from teacher.pool import connect

        if inputs.most_top_k is not None:
            log.warning("teacher.top_k_lowered", wanted=wanted_top_k(recipe), given=inputs.most_top_k)
            # What answers cost is said for as many as will be asked.
            config = msgspec.structs.replace(config, top_k=min(config.top_k, inputs.most_top_k))
        return connect(config, known=inputs.known)
    from teacher.local import LocalTeacher

    return LocalTeacher(config)
