"""From a log back to the costs that made it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import RunDirError
from engine.load_recipe import load_recipe
from engine.recipe import Recipe, ReplayConfig
from engine.simulate.fit import fit, non_negative_fit
from engine.simulate.lengths import Drawn, Observed
from engine.simulate.simulation import simulate
from tests.e2e.runs import ROOT

T = "2026-01-02T03:04:05.000000+00:00"


def logged(out: Path, *assignments: str) -> tuple[Recipe, Callable[[], float]]:
    """Simulate a recipe with a log, and give it together with its pace."""
    recipe, graph = load_recipe(
        ROOT / "recipes" / "replay_longtail.py", ["steps=6", "rollouts_per_step=32", *assignments]
    )
    pace = simulate(recipe, graph, Drawn(recipe), out=out).rollouts_per_s
    return recipe, lambda: pace


SLOW_EVERYTHING = (
    "replay.decode_step_s=0.02",
    "replay.decode_slot_s=0.001",
    "replay.prefill_token_s=1e-4",
    "replay.weights_push_s=3",
    "replay.weights_pause_s=1.5",
    "replay.teacher_batch_s=0.3",
    "replay.teacher_token_s=2e-4",
    "replay.teacher_latency_s=0.2",
    "replay.micro_batch_s=0.5",
    "replay.learner_token_s=3e-4",
    "replay.optimizer_s=2.5",
    "replay.checkpoint_s=7",
)


def test_known_costs_are_found_again(tmp_path: Path) -> None:
    recipe, _ = logged(tmp_path / "run", *SLOW_EVERYTHING)

    found = fit(tmp_path / "run", recipe).costs

    for name in ReplayConfig.__struct_fields__:
        known = getattr(recipe.replay, name)
        if name.endswith("_s"):
            assert getattr(found, name) == pytest.approx(known, rel=0.1, abs=2e-5), name
    assert (found.teacher_batch_rollouts, found.teacher_parallel) == (1, 1)


def test_a_teacher_that_works_side_by_side_is_told_from_one_that_does_not(tmp_path: Path) -> None:
    recipe, _ = logged(tmp_path / "run", "replay.teacher_parallel=8", "replay.teacher_token_s=5e-3")

    found = fit(tmp_path / "run", recipe).costs

    assert found.teacher_parallel == pytest.approx(8, abs=3)
    assert found.teacher_token_s == pytest.approx(5e-3, rel=0.1)


@pytest.mark.parametrize(
    "assignments",
    [
        ("workload=even", "max_staleness=1"),
        ("workload=generation_bound", "max_staleness=2", "replay.teacher_batch_rollouts=4"),
        ("workload=even", "replay.teacher_token_s=2e-3", "replay.teacher_parallel=2"),
        ("workload=even", "replay.num_teachers=3", "replay.teacher_token_s=1e-3"),
        ("samples_per_prompt=4", "replay.prefill_token_s=3e-4", "max_staleness=4"),
    ],
    ids=" ".join,
)
def test_a_simulation_of_the_fit_keeps_the_pace_and_the_bottleneck(
    tmp_path: Path, assignments: tuple[str, ...]
) -> None:
    recipe, graph = load_recipe(ROOT / "recipes" / "replay_longtail.py", ["steps=6", *assignments])
    before = simulate(recipe, graph, Drawn(recipe), out=tmp_path / "run")

    fitted = fit(tmp_path / "run", recipe)
    after = simulate(msgspec.structs.replace(recipe, replay=fitted.costs), graph, fitted.lengths)

    assert after.rollouts_per_s == pytest.approx(before.rollouts_per_s, rel=0.1)
    assert after.bottleneck == before.bottleneck


def test_lengths_are_those_of_the_run_in_the_order_of_its_tickets(tmp_path: Path) -> None:
    recipe, _ = logged(tmp_path / "run")
    drawn = Drawn(recipe)

    lengths = fit(tmp_path / "run", recipe).lengths

    num_rollouts = 6 * 32
    assert [lengths.answer(i) for i in range(num_rollouts)] == [drawn.answer(i) for i in range(num_rollouts)]
    assert lengths.answer(num_rollouts) == drawn.answer(0)


def test_answers_are_cut_at_the_limit_of_the_recipe_that_is_simulated() -> None:
    assert Observed([(3, 100)], longest=40).answer(0) == 40


def write(folder: Path, lines: list[dict[str, Any]], *, tail: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return folder


def test_torn_and_strange_lines_are_passed_over(tmp_path: Path) -> None:
    recipe, _ = logged(tmp_path / "run")
    path = tmp_path / "run" / "events.jsonl"
    whole = fit(tmp_path / "run", recipe).costs
    strange = b'\xff\xfe\n[1, 2]\n{"event": 7}\n{"no": "event"}\n\n{"event":"learner.step","dur_us":"x"}\n'
    path.write_bytes(strange + path.read_bytes() + b'{"event":"learner.st')

    assert fit(tmp_path / "run", recipe).costs == whole


def test_a_run_of_a_second_has_one_reading_of_its_generator_and_that_is_enough(tmp_path: Path) -> None:
    recipe, _ = logged(tmp_path / "run")
    path = tmp_path / "run" / "events.jsonl"
    whole = fit(tmp_path / "run", recipe).costs
    lines = path.read_text().splitlines(keepends=True)
    readings = [line for line in lines if '"generator.stats"' in line]
    path.write_text("".join(line for line in lines if line not in readings[:-1]))

    costs = fit(tmp_path / "run", recipe).costs

    last = json.loads(readings[-1])

    def busy_s(costs: ReplayConfig) -> float:
        return float(
            costs.decode_step_s * last["decode_steps_total"]
            + costs.decode_slot_s * last["tokens_total"]
            + costs.prefill_token_s * last["prefill_tokens_total"]
        )

    assert busy_s(costs) == pytest.approx(busy_s(whole), rel=0.05)
    assert costs.weights_pause_s == pytest.approx(whole.weights_pause_s, rel=0.05, abs=1e-3)


def test_what_failed_is_not_counted(tmp_path: Path) -> None:
    recipe, _ = logged(tmp_path / "run")
    whole = fit(tmp_path / "run", recipe).costs
    with (tmp_path / "run" / "events.jsonl").open("a") as file:
        file.write(
            f'{{"t":"{T}",'
            '"event":"learner.step","kind":"span","outcome":"NonFiniteError","start_ns":1,"dur_us":99000000}\n'
        )

    assert fit(tmp_path / "run", recipe).costs == whole


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"no finished answers \(sampler.rollout\), no seconds of decoding .* a few steps"),
        (
            [{"t": T, "event": "sampler.rollout", "rollout_id": 0, "num_tokens": 5}],
            r"run: its events.jsonl has no seconds of",
        ),
    ],
)
def test_a_run_that_tells_too_little_is_refused(tmp_path: Path, lines: list[dict[str, Any]], message: str) -> None:
    recipe, _ = load_recipe(ROOT / "recipes" / "replay_longtail.py", [])

    with pytest.raises(RunDirError, match=message):
        fit(write(tmp_path / "run", lines), recipe)


def test_a_folder_without_a_log_is_refused(tmp_path: Path) -> None:
    recipe, _ = load_recipe(ROOT / "recipes" / "replay_longtail.py", [])

    with pytest.raises(RunDirError, match=r"no folder .*nowhere; give the folder of a run"):
        fit(tmp_path / "nowhere", recipe)


@given(
    factors=st.lists(st.floats(0.0, 10.0), min_size=2, max_size=3),
    rows=st.lists(st.lists(st.floats(0.1, 100.0), min_size=3, max_size=3), min_size=4, max_size=20),
)
def test_the_fit_is_never_negative_and_adds_up(factors: list[float], rows: list[list[float]]) -> None:
    columns = [[row[i] for row in rows] for i in range(len(factors))]
    target = [sum(f * row[i] for i, f in enumerate(factors)) for row in rows]

    found = non_negative_fit(columns, target)

    assert all(factor >= 0 for factor in found)
    predicted = [sum(f * row[i] for i, f in enumerate(found)) for row in rows]
    assert sum(predicted) == pytest.approx(sum(target), rel=1e-6, abs=1e-9)
