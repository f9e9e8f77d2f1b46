"""The batch schedules that this engine replaces, over the same costs and lengths: every batch waits for its longest
answer, and nothing streams.

    serial         generate batch n, score it, train on it, bring the weights over; then batch n + 1
    one_step_off   batch n + 1 is generated while batch n is scored and trained
    two_step_off   batch n + 2 is generated while batch n + 1 is scored and batch n is trained

In each, the next round begins when the slowest part of this one has ended and the weights have been brought over. Pure.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence

from engine.build.parts import num_replicas
from engine.costs import decode_step_s, micro_batch_s, prefill_s, teacher_batch_s
from engine.recipe import Recipe, ReplayConfig
from engine.simulate.lengths import Lengths
from engine.simulate.result import ONE_STEP_OFF, SERIAL, TWO_STEP_OFF, Share, Simulated, mean_age


def baselines(recipe: Recipe, lengths: Lengths) -> dict[str, Simulated]:
    """All three."""
    return {name: _simulate(recipe, lengths, ahead) for name, ahead in _AHEAD.items()}


_AHEAD = {SERIAL: 0, ONE_STEP_OFF: 1, TWO_STEP_OFF: 2}
"""Batches that generation is ahead of training."""


def _simulate(recipe: Recipe, lengths: Lengths, ahead: int) -> Simulated:
    cpu_s = time.process_time()
    per_step, steps, replay = recipe.rollouts_per_step, recipe.steps, recipe.replay
    teachers = (replay.num_teachers or num_replicas(recipe)) * replay.teacher_parallel
    update_s = replay.weights_push_s + replay.weights_pause_s
    seconds = _aside_s(recipe)
    busy = {"sampler": 0.0, "teacher_proxy": 0.0, "learner": 0.0, "weight_syncer": 0.0}
    num_tokens = 0
    # Seconds of each batch in each part. Only the batches of one round are alive at a time.
    generated: dict[int, float] = {}
    scored: dict[int, float] = {}
    trained: dict[int, float] = {}
    for round_ in range(-ahead, steps):
        begun = round_ + ahead
        if begun < steps:
            tickets = range(begun * per_step, (begun + 1) * per_step)
            answers = [lengths.answer(ticket) for ticket in tickets]
            prompts = [lengths.prompt(ticket - ticket % recipe.samples_per_prompt) for ticket in tickets]
            whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
            generated[begun] = generate_batch_s(
                prompts, answers, replay, num_slots=recipe.sampler.num_slots, shared=recipe.samples_per_prompt
            )
            scored[begun] = score_batch_s(whole, replay, num_servers=teachers)
            trained[begun] = train_batch_s(whole, recipe)
            num_tokens += sum(answers)
        generate_s = generated.pop(begun, 0.0)
        score_s = scored.pop(round_ + (ahead == 2), 0.0)
        train_s = trained.pop(round_, 0.0)
        if ahead == 0:
            seconds += generate_s + score_s + train_s
        elif ahead == 1:
            seconds += max(generate_s, score_s + train_s)
        else:
            seconds += max(generate_s, score_s, train_s)
        if train_s and round_ < steps - 1:
            seconds += update_s
            busy["weight_syncer"] += update_s
        busy["sampler"] += generate_s
        busy["teacher_proxy"] += score_s
        busy["learner"] += train_s
    # Batch n is generated under the version that is there when its generation begins.
    staleness: dict[int, int] = {}
    for batch in range(steps):
        age = min(ahead, batch)
        staleness[age] = staleness.get(age, 0) + per_step
    num_rollouts = steps * per_step
    return Simulated(
        learner_utilization=busy["learner"] / seconds if seconds else 0.0,
        rollouts_per_s=num_rollouts / seconds if seconds else 0.0,
        tokens_per_s=num_tokens / seconds if seconds else 0.0,
        max_staleness_seen=max(staleness),
        mean_staleness=mean_age(staleness),
        staleness=staleness,
        num_dropped=0,
        bottleneck=max(busy, key=lambda name: busy[name]),
        seconds=seconds,
        steps=steps,
        num_rollouts=num_rollouts,
        cpu_s_per_rollout=(time.process_time() - cpu_s) / num_rollouts,
        actors=tuple(
            Share(actor=name, worked=min(1.0, share), waited_input=1.0 - min(1.0, share), waited_room=0.0)
            for name, share in ((name, work / seconds if seconds else 0.0) for name, work in busy.items())
        ),
    )


def generate_batch_s(
    prompts: Sequence[int], answers: Sequence[int], costs: ReplayConfig, *, num_slots: int, shared: int
) -> float:
    """A batch is spread evenly over the samplers; the batch is done when the last of them is.

    Args:
        shared: consecutive answers that share one prompt.
    """
    groups = [range(start, min(start + shared, len(answers))) for start in range(0, len(answers), shared)]
    slowest = 0.0
    for sampler in range(min(costs.num_samplers, len(groups))):
        mine = [
            (prompts[i], answers[i], i == group[0]) for group in groups[sampler :: costs.num_samplers] for i in group
        ]
        slowest = max(slowest, _sampler_s(mine, costs, num_slots))
    return slowest


def _sampler_s(rollouts: Sequence[tuple[int, int, bool]], costs: ReplayConfig, num_slots: int) -> float:
    """One sampler: (prompt, answer, whether its prompt is computed) of each; a free slot is taken at once."""
    running: list[int] = []
    seconds, steps, entered = 0.0, 0, 0
    while running or entered < len(rollouts):
        entering = rollouts[entered : entered + num_slots - len(running)]
        if entering:
            seconds += prefill_s(costs, sum(prompt for prompt, _, is_first in entering if is_first))
            for _, answer, _ in entering:
                heapq.heappush(running, steps + answer)
            entered += len(entering)
        num_steps = running[0] - steps
        seconds += num_steps * decode_step_s(costs, len(running))
        steps += num_steps
        while running and running[0] == steps:
            heapq.heappop(running)
    return seconds


def score_batch_s(lengths: Sequence[int], costs: ReplayConfig, *, num_servers: int) -> float:
    """Whoever is free takes the next rollouts; the last scores come one latency after the end of their batch."""
    free_at = [0.0] * min(num_servers, len(lengths))
    for start in range(0, len(lengths), costs.teacher_batch_rollouts):
        batch_s = teacher_batch_s(costs, sum(lengths[start : start + costs.teacher_batch_rollouts]))
        heapq.heapreplace(free_at, free_at[0] + batch_s)
    return max(free_at) + costs.teacher_latency_s


def train_batch_s(lengths: Sequence[int], recipe: Recipe) -> float:
    """Micro-batches under the recipe's limits, in order, and the optimizer."""
    learner = recipe.learner
    seconds = recipe.replay.optimizer_s
    micro: list[int] = []
    num_tokens = 0
    for length in lengths:
        is_full = len(micro) == learner.micro_batch_rollouts or num_tokens + length > learner.micro_batch_tokens
        if micro and is_full:
            seconds += micro_batch_s(recipe.replay, micro)
            micro, num_tokens = [], 0
        micro.append(length)
        num_tokens += length
    return seconds + micro_batch_s(recipe.replay, micro)


def _aside_s(recipe: Recipe) -> float:
    """Measurements and checkpoints of the whole run, as the learner does them."""
    steps, every = recipe.steps, recipe.checkpoint.every_steps
    num_saved = len({step for step in range(1, steps + 1) if every and step % every == 0} | {steps})
    num_measured = 0
    if recipe.evaluation is not None:
        measured = recipe.evaluation.every_steps
        num_measured = len({step for step in range(steps + 1) if measured and step % measured == 0} | {0, steps})
    return num_saved * recipe.replay.checkpoint_s + num_measured * recipe.replay.evaluation_s
