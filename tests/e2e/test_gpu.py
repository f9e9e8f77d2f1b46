"""The whole loop on a GPU: sampler, teacher and learner share it, each thread with a stream of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.runs import World, assert_exactly_once, events, run, weights_digest

pytestmark = pytest.mark.gpu

ON_GPU = [part for section in ("sampler", "learner", "teacher") for part in ("--set", f"{section}.device=cuda")]


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_a_run_brings_the_student_closer_and_trains_everything_once(world: World, tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "out"

    dtypes = ["--set", f"sampler.dtype={dtype}", "--set", f"teacher.dtype={dtype}"]
    run(world.recipe(tmp_path / "r.py"), *ON_GPU, *dtypes, "--out", str(out), "--json")

    assert_exactly_once(out, steps=6, per_step=4, max_staleness=1)
    kls = [line["kl"] for line in events(out) if line["event"] == "eval.run"]
    assert kls[1] < kls[0]


def test_a_synchronous_run_computes_what_the_cpu_computes(world: World, tmp_path: Path) -> None:
    recipe = world.recipe(tmp_path / "r.py")
    strict = ["--set", "max_staleness=0", "--set", "deterministic=true", "--set", "learner.autocast=off"]
    run(recipe, *strict, "--out", str(tmp_path / "cpu"), "--json")
    run(recipe, *strict, *ON_GPU, "--out", str(tmp_path / "gpu"), "--json")

    on_cpu, on_gpu = (
        [line["loss"] for line in events(tmp_path / name) if line["event"] == "learner.step"] for name in ("cpu", "gpu")
    )
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)


def test_two_deterministic_runs_end_in_the_same_bits(world: World, tmp_path: Path) -> None:
    recipe = world.recipe(tmp_path / "r.py")
    strict = ["--set", "max_staleness=0", "--set", "deterministic=true"]
    for name in ("a", "b"):
        run(recipe, *strict, *ON_GPU, "--out", str(tmp_path / name), "--json")

    assert weights_digest(tmp_path / "a", 6) == weights_digest(tmp_path / "b", 6)
