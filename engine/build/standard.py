"""The graph that a recipe stands for unless it says otherwise: its actors, its channels, how much may wait in each."""

from __future__ import annotations

from pathlib import Path

from engine.actor import RestartPolicy
from engine.build.actors import (
    make_learner,
    make_prompt_feeder,
    make_sampler,
    make_teacher_proxy,
    make_weight_syncer,
)
from engine.graph import ActorSpec, ChannelSpec, Graph
from engine.recipe import Recipe, RemoteTeacher
from engine.types import ScoredRollout
from teacher.protocol import Scores

_RESTARTS = RestartPolicy(max_restarts=3, window_s=300.0, backoff_s=1.0, max_backoff_s=30.0)
"""For actors that hold nothing which cannot be made again."""

_SCORED_BYTES = 256 << 20
"""Scores that may wait in front of the learner."""


def standard_graph(recipe: Recipe) -> Graph:
    """The loop of the architecture: prompts → sampler → teacher proxy → learner → weight syncer."""
    per_step = recipe.rollouts_per_step
    return Graph(
        actors=(
            ActorSpec(
                name="prompt_feeder",
                make=make_prompt_feeder,
                produces="prompts",
                about=f"admits up to {(recipe.max_staleness + 1) * per_step} rollouts at a time",
            ),
            ActorSpec(
                name="sampler",
                make=make_sampler,
                consumes="prompts",
                produces="rollouts",
                restart=_RESTARTS,
                about=f"{recipe.sampler.backend} on {recipe.sampler.device}, {_num_slots(recipe)} slots",
            ),
            ActorSpec(
                name="teacher_proxy",
                make=make_teacher_proxy,
                consumes="rollouts",
                produces="scored",
                restart=_RESTARTS,
                about=_about_teacher(recipe),
            ),
            ActorSpec(
                name="learner",
                make=make_learner,
                consumes="scored",
                produces="versions",
                about=f"{recipe.learner.backend} on {_about_learner(recipe)}, {recipe.objective.kind}, "
                f"{per_step} rollouts per step",
            ),
            ActorSpec(name="weight_syncer", make=make_weight_syncer, consumes="versions", about=recipe.weights.mode),
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


def _num_slots(recipe: Recipe) -> int:
    """Answers that are decoded side by side."""
    sampler = recipe.sampler
    copies = sampler.vllm.num_engines * sampler.vllm.data_parallel
    return sampler.num_slots * (copies if sampler.backend == "vllm" else 1)


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
