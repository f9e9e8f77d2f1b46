"""Runs a recipe's own graph (feeder, sampler, teacher proxy, learner, syncer, and actors of the user's) on virtual
time. No decision is made here: the flow, the channels and the supervisor are those of a real run."""

from __future__ import annotations

import asyncio
import gc
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from engine.build.life import Built, build
from engine.graph import Graph
from engine.ledger import Ledger
from engine.node import say_statistics
from engine.recipe import Recipe
from engine.run_dir import RunDir
from engine.simulate.lengths import Lengths
from engine.simulate.parts import SimulatedParts, simulated_parts
from engine.simulate.result import Share, Simulated, mean_age
from engine.supervisor import Supervisor
from engine.tracing import Tracing, log, span
from engine.virtual_time import VirtualClock, VirtualLoop, run_virtual

_TICK_S = 1.0


def simulate(recipe: Recipe, graph: Graph, lengths: Lengths, *, out: Path | None = None) -> Simulated:
    """Run ``recipe`` to its last step.

    Args:
        out: write the log of the simulated run there, in virtual time.

    Raises:
        Deadlock: the run hangs.
        ActorFailed: an actor of the user's failed.
        RecipeError: an actor of the user's cannot be made without a model, prompts or a tokenizer.
    """
    cpu_s = time.process_time()
    with (
        _rare_collections(),
        tempfile.TemporaryDirectory(prefix="simulation-") as folder,
        Tracing(level="error" if out is None else "info") as tracing,
        closing(Ledger.in_memory(run_name=recipe.name, seed=recipe.seed)) as ledger,
    ):
        made, built, seconds = run_virtual(lambda: _run(recipe, graph, lengths, ledger, Path(folder), tracing, out))
        cpu_s = time.process_time() - cpu_s
        return _conclude(recipe, made, built, seconds=seconds, cpu_s=cpu_s)


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Thousands of rollouts are in flight for long and are no garbage: to look at them again after every few thousand
    objects costs more the more there are."""
    before = gc.get_threshold()
    gc.set_threshold(50_000, 20, 20)
    try:
        yield
    finally:
        gc.set_threshold(*before)


async def _run(
    recipe: Recipe, graph: Graph, lengths: Lengths, ledger: Ledger, folder: Path, tracing: Tracing, out: Path | None
) -> tuple[SimulatedParts, Built, float]:
    clock = VirtualClock()
    made = simulated_parts(recipe, lengths, ledger=ledger, folder=folder if out is None else out, clock=clock)
    built = build(graph, made.parts)
    if out is not None:
        _open_log(recipe, made, built, tracing, out, clock)
    supervisor = Supervisor(clock)
    for actor in built.actors:
        supervisor.add(actor, restart=built.restarts[actor.name], at_end=built.at_end.get(actor.name))
    try:
        with span("run.start"):
            await supervisor.start_all()
        await supervisor.wait()
        seconds = clock.now()
    finally:
        await supervisor.stop()
        await made.teacher.close()
    if out is not None:
        _look(built, made)
    log.info("run.finished", step=made.parts.schedule.version, stopped_by=None, wall_s=seconds)
    return made, built, seconds


def _open_log(
    recipe: Recipe, made: SimulatedParts, built: Built, tracing: Tracing, out: Path, clock: VirtualClock
) -> None:
    run_dir = RunDir.create(out)
    run_dir.keep_recipe(recipe)
    tracing.open(out, run=recipe.name, node="0", clock_ns=lambda: round(clock.now() * 1e9))
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.watch(lambda: _look(built, made), every_s=_TICK_S)
    log.info(
        "run.started",
        recipe=recipe.name,
        steps=recipe.steps,
        rollouts_per_step=recipe.rollouts_per_step,
        max_staleness=recipe.max_staleness,
        objective=recipe.objective.kind,
        step=0,
        out=str(out),
    )
    log.info("run.graph", actors=built.wiring)


def _look(built: Built, made: SimulatedParts) -> None:
    say_statistics(built, made.generator)


def _conclude(recipe: Recipe, made: SimulatedParts, built: Built, *, seconds: float, cpu_s: float) -> Simulated:
    ledger, trainer = made.parts.ledger, made.trainer
    num_rollouts = ledger.counts()["trained"]
    staleness = ledger.ages()
    actors = _shares(made, built, seconds)
    return Simulated(
        learner_utilization=trainer.busy_s / seconds if seconds else 0.0,
        rollouts_per_s=num_rollouts / seconds if seconds else 0.0,
        tokens_per_s=trainer.tokens_total / seconds if seconds else 0.0,
        max_staleness_seen=max(staleness, default=0),
        mean_staleness=mean_age(staleness),
        staleness=staleness,
        num_dropped=ledger.counts()["failed"],
        bottleneck=max(actors, key=lambda share: share.worked).actor,
        seconds=seconds,
        steps=made.parts.schedule.version,
        num_rollouts=num_rollouts,
        cpu_s_per_rollout=cpu_s / max(1, num_rollouts),
        actors=actors,
    )


def _shares(made: SimulatedParts, built: Built, seconds: float) -> tuple[Share, ...]:
    """As the summary of a real run counts them (``engine.monitor.view``)."""
    worked = {
        "sampler": made.generator.statistics().busy_s,
        "teacher_proxy": made.teacher.busy_s(),
        "learner": made.trainer.busy_s + made.aside.busy_s,
        "weight_syncer": made.push.busy_s,
        "prompt_feeder": 0.0,
    }
    shares = []
    for wire in built.wiring:
        name, consumes, produces = wire["name"], wire["consumes"], wire["produces"]
        assert name is not None
        room_s = 0.0 if produces is None else built.senders[produces].statistics().send_wait_s
        input_s = 0.0 if consumes is None else built.senders[consumes].statistics().receive_wait_s
        # What is not waiting is work, in an actor that nobody clocks.
        busy = min(1.0, max(0.0, worked.get(name, seconds - input_s - room_s) / seconds)) if seconds else 0.0
        room = min(1.0 - busy, room_s / seconds) if seconds else 0.0
        shares.append(Share(actor=name, worked=busy, waited_input=1.0 - busy - room, waited_room=room))
    return tuple(shares)
