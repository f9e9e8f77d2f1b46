"""``--simulate`` by its real command: one object on stdout, no files needed, mistakes end in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.runs import ROOT, World, run

LONGTAIL = ROOT / "recipes" / "replay_longtail.py"
KEYS = {
    "learner_utilization",
    "rollouts_per_s",
    "max_staleness_seen",
    "mean_staleness",
    "num_dropped",
    "bottleneck",
    "cpu_s_per_rollout",
}


def simulate(recipe: Path, *arguments: str) -> Any:
    finished = run(recipe, "--simulate", "--json", *arguments)
    assert finished.stderr == ""
    assert len(finished.stdout.splitlines()) == 1
    return finished.json()


def test_the_reference_workload_by_its_command() -> None:
    found = simulate(LONGTAIL, "--set", "workload=even", "--set", "max_staleness=1", "--set", "replay.length_sigma=0.8")

    assert found.keys() >= KEYS
    assert found["baselines"].keys() == {"serial", "one_step_off", "two_step_off"}
    assert all(baseline.keys() >= KEYS for baseline in found["baselines"].values())
    assert found["one_more"].keys() == {"sampler", "teacher", "learner"}
    assert found["learner_utilization"] > found["baselines"]["one_step_off"]["learner_utilization"] + 0.3
    assert (found["max_staleness_seen"], found["num_dropped"]) == (1, 0)
    assert found["costs"]["length_sigma"] == 0.8
    assert found["costs_from"] == "recipe"


def test_equal_commands_say_equal_things() -> None:
    def numbers() -> str:
        text = json.dumps(simulate(LONGTAIL, "--set", "steps=3"))
        return re.sub(r'"cpu_s_per_rollout": [^,}]*', "", text)

    assert numbers() == numbers()


def test_a_plan_needs_no_models_and_leaves_nothing_behind(tmp_path: Path) -> None:
    recipe = tmp_path / "plan.py"
    recipe.write_text(
        "from engine.recipe import *\n\n"
        "def recipe():\n"
        '    return Recipe(name="plan", steps=4, student=StudentConfig(path="/rented/student"),\n'
        '        teacher=HttpTeacher(urls=("http://gpu-1:1", "http://gpu-2:1")), data=DataConfig(path="/rented/p"),\n'
        '        evaluation=EvalConfig(data=DataConfig(path="/rented/held_out.jsonl")))\n'
    )

    text = run(recipe, "--simulate").stdout

    assert "plan: 4 steps of 64 rollouts, at most 1 versions old, simulated" in text
    assert "defaults that fit no machine" in text
    for word in ("learner utilisation", "rollouts/s", "staleness", "no input", "bottleneck", "with one more", "serial"):
        assert word in text
    assert [path.name for path in tmp_path.iterdir()] == ["plan.py"]


def test_the_demo_can_be_simulated() -> None:
    assert simulate(ROOT / "recipes" / "smollm2.py", "--set", "steps=4")["num_rollouts"] == 32


def test_a_real_run_is_simulated_from_its_own_log(world: World, tmp_path: Path) -> None:
    recipe = world.recipe(tmp_path / "recipe.py")
    # Long enough for a few readings of the generator, which come once a second.
    settings = ("--set", "steps=40", "--set", "checkpoint.every_steps=0", "--set", "sampler.max_new_tokens=48")
    real = run(recipe, "--out", str(tmp_path / "real"), "--json", *settings).json()

    found = simulate(recipe, "--simulate-from", str(tmp_path / "real"), *settings)

    # Models this small cost less than what moves the data between them, which a fit does not see: the prediction is no
    # slower than the run, and the learner computes as long in both. How well a run is met whose models do the work is
    # measured, not tested: docs/measurements.
    assert found["rollouts_per_s"] > 0.85 * real["rollouts_per_s"]
    busy_s = found["learner_utilization"] * found["num_rollouts"] / found["rollouts_per_s"]
    assert busy_s == pytest.approx(learner_seconds(tmp_path / "real"), rel=0.02)
    assert found["costs_from"] == str(tmp_path / "real")


def learner_seconds(folder: Path) -> float:
    """That its learner spent on micro-batches and optimizer steps."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    wanted = ("learner.micro_batch", "learner.step")
    return float(sum(event["dur_us"] for event in events if event["event"] in wanted) / 1e6)


def test_a_simulated_run_can_be_kept_and_simulated_from(tmp_path: Path) -> None:
    first = simulate(LONGTAIL, "--set", "steps=4", "--out", str(tmp_path / "kept"))
    again = simulate(LONGTAIL, "--set", "steps=4", "--simulate-from", str(tmp_path / "kept"))

    assert (tmp_path / "kept" / "recipe.json").exists()
    assert again["rollouts_per_s"] == pytest.approx(first["rollouts_per_s"], rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "workload=odd"), "takes workload: Literal['generation_bound', 'even']"),
        (("--set", "replay.decode_step_s=0"), "Expected `float` >= 1e-09 - at `$.replay.decode_step_s`"),
        (("--set", "replay.optimizer_s=-1"), "Expected `float` >= 0.0 - at `$.replay.optimizer_s`"),
        (("--set", "replay.optimizer_s=inf"), "Expected `float` <= 1000000000.0 - at `$.replay.optimizer_s`"),
        (("--set", "replay.length_min=9000"), "replay.length_min=9000 is more than replay.length_max=8192"),
        (("--set", "replay.nothing=1"), "no field 'replay.nothing' in this recipe"),
        (("--simulate-from", "/nowhere"), "there is no folder /nowhere"),
        (("--resume",), "it does not go with --resume"),
        (("--check",), "it does not go with --check"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    finished = run(LONGTAIL, "--simulate", *arguments, expect=2)

    assert message in finished.stderr
    assert finished.stderr.startswith("error: ")
    assert len(finished.stderr.splitlines()) == 1
    assert finished.stdout == ""
