"""The real scheduler on virtual time: what it reaches on the reference workload, and that nothing of it is made up."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from engine.actor import Actor
from engine.errors import ActorFailed, Deadlock, RecipeError
from engine.graph import Graph, Ports
from engine.load_recipe import load_recipe
from engine.recipe import Recipe
from engine.simulate.baselines import baselines
from engine.simulate.lengths import Drawn
from engine.simulate.result import Simulated
from engine.simulate.simulation import simulate
from engine.simulate.what_if import what_if
from tests.e2e.runs import ROOT

LONGTAIL = ROOT / "recipes" / "replay_longtail.py"


def longtail(*assignments: str) -> tuple[Recipe, Graph]:
    return load_recipe(LONGTAIL, list(assignments))


def simulated(*assignments: str, edit: object = None) -> Simulated:
    recipe, graph = longtail(*assignments)
    graph = graph if edit is None else edit(graph)  # type: ignore[operator]
    return simulate(recipe, graph, Drawn(recipe))


@pytest.mark.parametrize(
    ("workload", "max_staleness", "utilization", "seed"),
    [
        ("generation_bound", 0, 0.33, 0),
        ("generation_bound", 1, 0.62, 0),
        ("generation_bound", 2, 0.86, 1),
        ("generation_bound", 4, 0.98, 0),
        ("even", 0, 0.74, 8),
        ("even", 1, 0.95, 0),
        ("even", 2, 0.95, 1),
    ],
)
def test_the_learner_is_kept_busy_and_the_bound_holds(
    workload: str, max_staleness: int, utilization: float, seed: int
) -> None:
    found = simulated(f"workload={workload}", f"max_staleness={max_staleness}", f"seed={seed}")

    assert found.learner_utilization >= utilization
    assert found.max_staleness_seen <= max_staleness
    assert found.num_dropped == 0
    assert (found.steps, found.num_rollouts) == (40, 40 * 128)
    assert sum(found.staleness.values()) == found.num_rollouts


@pytest.mark.parametrize(
    ("workload", "expected"),
    [("generation_bound", (0.24, 0.38, 0.38)), ("even", (0.33, 0.49, 0.88))],
)
def test_batch_schedules_reach_what_they_are_known_to_reach(workload: str, expected: tuple[float, ...]) -> None:
    recipe, _ = longtail(f"workload={workload}")

    found = baselines(recipe, Drawn(recipe))

    assert list(found) == ["serial", "one_step_off", "two_step_off"]
    assert tuple(batch.learner_utilization for batch in found.values()) == pytest.approx(expected, abs=0.012)
    assert [batch.max_staleness_seen for batch in found.values()] == [0, 1, 2]


def test_equal_seeds_give_equal_numbers_and_others_do_not() -> None:
    def numbers(seed: int) -> Simulated:
        return msgspec.structs.replace(simulated("steps=3", f"seed={seed}"), cpu_s_per_rollout=0.0)

    assert numbers(5) == numbers(5)
    assert numbers(5).seconds != numbers(6).seconds


def test_one_more_of_what_is_short_helps_and_of_what_is_not_does_not() -> None:
    recipe, graph = longtail("steps=4", "max_staleness=4", "replay.learner_token_s=1e-6")
    lengths = Drawn(recipe)

    more = what_if(recipe, graph, lengths, simulate(recipe, graph, lengths))

    assert more["sampler"].gain > 0.3
    assert abs(more["teacher"].gain) < 0.05
    assert list(more) == ["sampler", "teacher", "learner"]


@pytest.mark.parametrize(
    "assignments",
    [
        ("deterministic=true", "max_staleness=0"),
        ("samples_per_prompt=4", "replay.prefill_token_s=1e-4"),
        ("weights.mode=drain", "max_staleness=4"),
        ("learner.micro_batch_rollouts=null",),
        ("checkpoint.every_steps=2", "replay.checkpoint_s=30"),
        ("replay.num_samplers=5", "replay.num_teachers=3", "replay.num_learners=2"),
        ("replay.teacher_batch_rollouts=16", "replay.teacher_parallel=2"),
        ("sampler.num_slots=1", "rollouts_per_step=2"),
        ("rollouts_per_step=1", "max_staleness=9"),
        ("replay.length_sigma=0", "replay.length_mu=0", "replay.length_min=1"),
        ("replay.weights_pause_s=0", "replay.optimizer_s=0", "replay.learner_token_s=0", "replay.teacher_latency_s=0"),
        ("sampler.max_new_tokens=5",),
    ],
    ids=" ".join,
)
def test_every_kind_of_recipe_comes_to_its_end(assignments: tuple[str, ...]) -> None:
    found = simulated("steps=3", *assignments)

    assert found.steps == 3
    assert found.num_dropped == 0
    assert found.seconds > 0
    assert 0 <= found.learner_utilization <= 1
    assert sum(found.staleness.values()) == found.num_rollouts
    for share in found.actors:
        assert share.worked + share.waited_input + share.waited_room == pytest.approx(1.0)


def test_references_are_neither_sampled_nor_stale() -> None:
    found = simulated(
        "steps=3", "data.reference_share=1", "data.reference_column=answer", "replay.teacher_token_s=1e-6"
    )

    assert found.num_rollouts == 3 * 128
    assert next(share for share in found.actors if share.actor == "sampler").worked < 0.2


def test_evaluations_and_checkpoints_take_the_learners_time() -> None:
    plain = simulated("steps=4", "checkpoint.every_steps=0")
    slow = simulated("steps=4", "checkpoint.every_steps=2", "replay.checkpoint_s=100")

    assert slow.seconds - plain.seconds == pytest.approx(200, abs=60), "two of them; others go on meanwhile"


class Odd(Actor):
    """Hands on what has an even ticket."""

    def __init__(self, ports: Ports, *, is_honest: bool) -> None:
        super().__init__(ports.name)
        self._ports = ports
        self._is_honest = is_honest

    async def run(self) -> None:
        async for rollout in self._ports.input:
            if rollout.rollout_id % 2 == 0:
                await self._ports.output.send(rollout)
            elif self._is_honest:
                self._ports.parts.schedule.failed(rollout.rollout_id, "odd")
        self._ports.output.close()


def insert(make: object) -> object:
    return lambda graph: graph.insert("odd", after="sampler", make=make)


def test_an_actor_of_ones_own_takes_part_and_is_in_the_shares() -> None:
    found = simulated("steps=2", "rollouts_per_step=8", edit=insert(lambda ports: Odd(ports, is_honest=True)))

    assert found.num_rollouts == 16
    assert found.num_dropped >= 15, "every second one, and another prompt in its place"
    assert "odd" in [share.actor for share in found.actors]


def test_an_actor_that_keeps_rollouts_is_found_out() -> None:
    with pytest.raises(Deadlock, match=r"(?s)keep a rollout that it neither.*Receiver.receive \[rollouts\]") as caught:
        simulated("steps=2", "rollouts_per_step=8", edit=insert(lambda ports: Odd(ports, is_honest=False)))

    assert "Odd.run [odd]" in str(caught.value)


def test_an_actor_that_wants_words_is_told_that_there_are_none() -> None:
    class Reader(Odd):
        def __init__(self, ports: Ports) -> None:
            super().__init__(ports, is_honest=True)
            ports.parts.tokenizer.get_vocab()

    with pytest.raises(RecipeError, match="a simulated run has no tokenizer"):
        simulated("steps=2", edit=insert(Reader))


def test_an_actor_that_fails_ends_the_simulation() -> None:
    class Broken(Odd):
        async def run(self) -> None:
            raise ValueError("too odd")

    with pytest.raises(ActorFailed, match="too odd"):
        simulated("steps=2", edit=insert(lambda ports: Broken(ports, is_honest=True)))


def test_the_log_of_a_simulated_run_is_one_that_the_view_reads(tmp_path: Path) -> None:
    from engine.monitor.view import RunView

    recipe, graph = longtail("steps=3", "rollouts_per_step=16")
    found = simulate(recipe, graph, Drawn(recipe), out=tmp_path / "out")

    view = RunView()
    for line in (tmp_path / "out" / "events.jsonl").read_bytes().splitlines():
        view.apply(msgspec.json.decode(line))
    assert (view.step, view.totals["trained"], view.ended) == (3, 48, "finished")
    assert view.elapsed_s == pytest.approx(found.seconds, abs=0.01)
    assert dict(view.ages) == found.staleness
    for share in found.actors:
        seen = view.overall_shares(view.actors[share.actor])
        assert seen.worked == pytest.approx(share.worked, abs=0.05), share.actor
