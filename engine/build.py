"""From a recipe to a graph of actors and channels, and from a graph to living objects: the only place that knows all
classes. Nothing here runs; ``engine.node`` starts what is made."""

from __future__ import annotations

import asyncio
import itertools
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from engine.actor import Actor, RestartPolicy, Worker
from engine.actors.checkpointer import Checkpointer
from engine.actors.evaluator import Evaluator, HeldOut
from engine.actors.learner import DescribeAnswer, Learner
from engine.actors.prompt_feeder import PromptFeeder
from engine.actors.sampler import Sampler
from engine.actors.teacher_proxy import TeacherProxy
from engine.actors.trained_answer import describe
from engine.actors.weight_probe import WeightProbe
from engine.actors.weight_syncer import WeightPush, WeightSyncer
from engine.check.asked import longest, sampling_params, wanted_top_k
from engine.check.folder import ledger_identity
from engine.check.look import Inputs
from engine.check.scorer import load_scorer
from engine.checkpoint import Checkpoint, CheckpointState, CheckpointStore, package_versions
from engine.clock import Clock
from engine.errors import ClosedChannel, EndOfChannel, RecipeError, UserError, WouldBlock
from engine.evaluations import read_evaluations
from engine.flow import Flow
from engine.generation.protocol import Generator
from engine.graph import ActorSpec, ChannelSpec, Graph, Ports
from engine.ledger import Ledger
from engine.parts import Parts
from engine.prompts import PromptRow, PromptSet, PromptSource, Tokenizer
from engine.recipe import Recipe, RemoteTeacher
from engine.run_dir import RunDir
from engine.schedule import Schedule
from engine.streams import stream_key
from engine.tracing import log
from engine.training.protocol import TokenLosses, Trainer
from engine.transport.channel import Receiver, Sender, open_channel
from engine.types import Prompt, ScoredRollout
from teacher.protocol import Scores, Teacher

_RESTARTS = RestartPolicy(max_restarts=3, window_s=300.0, backoff_s=1.0, max_backoff_s=30.0)
"""For actors that hold nothing which cannot be made again."""

_SCORED_BYTES = 256 << 20
"""Scores that may wait in front of the learner."""


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """A graph come to life, not started."""

    actors: tuple[Actor, ...]
    """In the order in which they start."""
    restarts: dict[str, RestartPolicy | None]
    wiring: tuple[dict[str, str | None], ...]
    """Name of each actor and of the channels that it consumes and produces, in the order of the flow."""
    senders: dict[str, Sender[Any]]
    """One end of every channel, for its statistics."""
    at_end: dict[str, Callable[[], None]]
    """By actor: what must be so when it has come to its end."""


def standard_graph(recipe: Recipe) -> Graph:
    """The loop of the architecture: prompts → sampler → teacher proxy → learner → weight syncer."""
    per_step = recipe.rollouts_per_step
    return Graph(
        actors=(
            ActorSpec(
                name="prompt_feeder",
                make=_prompt_feeder,
                produces="prompts",
                about=f"admits up to {(recipe.max_staleness + 1) * per_step} rollouts at a time",
            ),
            ActorSpec(
                name="sampler",
                make=_sampler,
                consumes="prompts",
                produces="rollouts",
                restart=_RESTARTS,
                about=f"{recipe.sampler.backend} on {recipe.sampler.device}, {_num_slots(recipe)} slots",
            ),
            ActorSpec(
                name="teacher_proxy",
                make=_teacher_proxy,
                consumes="rollouts",
                produces="scored",
                restart=_RESTARTS,
                about=_about_teacher(recipe),
            ),
            ActorSpec(
                name="learner",
                make=_learner,
                consumes="scored",
                produces="versions",
                about=f"{recipe.learner.backend} on {_about_learner(recipe)}, {recipe.objective.kind}, "
                f"{per_step} rollouts per step",
            ),
            ActorSpec(name="weight_syncer", make=_weight_syncer, consumes="versions", about=recipe.weights.mode),
        ),
        channels=(
            # A prompt that waits here has taken a slot and is not being answered: few, unless a wave is collected.
            ChannelSpec(
                name="prompts",
                carries="Prompt",
                max_items=per_step if recipe.deterministic else max(2, recipe.samples_per_prompt),
            ),
            ChannelSpec(name="rollouts", carries="Rollout", max_items=2 * per_step),
            ChannelSpec(
                name="scored",
                carries="ScoredRollout",
                max_items=2 * per_step,
                max_weight=_SCORED_BYTES,
                weigh=_num_bytes,
                unit="bytes",
            ),
            ChannelSpec(name="versions", carries="policy version", max_items=recipe.max_staleness + 2),
        ),
    )


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


def _num_slots(recipe: Recipe) -> int:
    """Answers that are decoded side by side."""
    sampler = recipe.sampler
    copies = sampler.vllm.num_engines * sampler.vllm.data_parallel
    return sampler.num_slots * (copies if sampler.backend == "vllm" else 1)


def sampler_spare(recipe: Recipe) -> int:
    """Answers under way beyond what the generator decodes: a finished slot is refilled at the next decode step."""
    return max(1, recipe.samples_per_prompt)


def num_replicas(recipe: Recipe) -> int:
    """Of the teacher."""
    return len(recipe.teacher.urls) if isinstance(recipe.teacher, RemoteTeacher) else 1


def build(graph: Graph, parts: Parts) -> Built:
    """Make the channels and the actors of ``graph``.

    Raises:
        RecipeError: a maker of the user's own raised, or made something else than an actor.
    """
    graph.check()
    ends: dict[str | None, tuple[Sender[Any], Receiver[Any]]] = {
        channel.name: open_channel(
            channel.name,
            max_items=channel.max_items,
            max_weight=channel.max_weight,
            weigh=channel.weigh,
            clock=parts.clock,
        )
        for channel in graph.channels
    }
    nothing: tuple[Sender[Any], Receiver[Any]] = open_channel("nothing", max_items=1)
    actors = tuple(
        _make_actor(
            spec,
            Ports(
                name=spec.name,
                input=ends.get(spec.consumes, nothing)[1],
                output=ends.get(spec.produces, nothing)[0],
                parts=parts,
            ),
        )
        for spec in graph.start_order()
    )
    return Built(
        actors=actors,
        restarts={spec.name: spec.restart for spec in graph.actors},
        wiring=tuple(
            {"name": spec.name, "consumes": spec.consumes, "produces": spec.produces} for spec in graph.actors
        ),
        senders={name: sender for name, (sender, _) in ends.items() if name is not None},
        at_end={
            spec.name: partial(_end, ends[spec.consumes][1], ends[spec.produces][0])
            for spec in graph.actors
            if spec.consumes is not None and spec.produces is not None
        },
    )


def _end(received: Receiver[Any], handed_on: Sender[Any]) -> None:
    """What an actor between two channels leaves behind: an output that is closed, as nothing comes from it any more.

    Raises:
        RecipeError: its input goes on, so who fills it would wait for ever.
    """
    handed_on.close()
    try:
        received.try_receive()
    except EndOfChannel:
        return
    except (WouldBlock, ClosedChannel):
        pass
    raise RecipeError(f"its run() returned before {received.name!r} ended; an actor reads its input until that ends")


def _make_actor(spec: ActorSpec, ports: Ports) -> Actor:
    try:
        actor = spec.make(ports)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        # What fails in our own makers is our mistake and keeps its traceback.
        if getattr(spec.make, "__module__", None) == __name__:
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise RecipeError(
            f"actor {spec.name!r}: its make(ports) raised {type(error).__name__}: {error} "
            f"({last.filename}:{last.lineno})"
        ) from error
    if not isinstance(actor, Actor):
        raise RecipeError(f"actor {spec.name!r}: its make(ports) returned {type(actor).__name__}, expected an Actor")
    return actor


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
    if inputs.most_top_k is not None:
        log.warning("teacher.top_k_lowered", wanted=wanted_top_k(recipe), given=inputs.most_top_k)
    if isinstance(recipe.teacher, RemoteTeacher):
        from teacher.pool import connect

        return connect(recipe.teacher, known=inputs.known)
    from teacher.local import LocalTeacher

    return LocalTeacher(recipe.teacher)


def _top_k(parts: Parts, wanted: int) -> int:
    return wanted if parts.most_top_k is None else min(wanted, parts.most_top_k)


def _prompt_feeder(ports: Ports) -> Actor:
    return PromptFeeder(ports.name, prompts=ports.output, schedule=ports.parts.schedule)


def _sampler(ports: Ports) -> Actor:
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


def _teacher_proxy(ports: Ports) -> Actor:
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


def _learner(ports: Ports) -> Actor:
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


def _answer_describer(tokenizer: Tokenizer) -> DescribeAnswer:
    def decode(ids: Sequence[int], without_special: bool) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=without_special))

    def describe_answer(scored: ScoredRollout[Scores], losses: TokenLosses, step: int, age: int) -> dict[str, object]:
        return describe(scored, losses, step=step, age=age, decode=decode)

    return describe_answer


def _weight_syncer(ports: Ports) -> Actor:
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


def _about_learner(recipe: Recipe) -> str:
    learner, megatron = recipe.learner, recipe.learner.megatron
    if learner.backend != "megatron":
        return learner.device
    named = {
        "tensor": megatron.tensor_parallel,
        "pipeline": megatron.pipeline_parallel,
        "context": megatron.context_parallel,
        "data": megatron.data_parallel,
        "expert": megatron.expert_parallel,
    }
    cut = ", ".join(f"{name} {size}" for name, size in named.items() if size > 1)
    return f"{megatron.num_ranks} × {learner.device}" + (f" ({cut})" if cut else "")


def _about_teacher(recipe: Recipe) -> str:
    teacher = recipe.teacher
    where = (
        ", ".join(teacher.urls) if isinstance(teacher, RemoteTeacher) else f"{Path(teacher.model).name} in this process"
    )
    return f"{where}, top {teacher.top_k}"


def _num_bytes(scored: ScoredRollout[Scores]) -> float:
    scores = scored.scores
    return float(scores.top_ids.nbytes + scores.top_logprobs.nbytes + scores.sampled_logprobs.nbytes)
