"""``recipes/qwen3.py``: what can be said of it without a GPU, and its tiny profile from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.recipe import with_overrides
from recipes import tiny_models
from recipes.qwen3 import recipe
from tests.e2e.runs import ROOT, run

RECIPE = ROOT / "recipes" / "qwen3.py"


@pytest.mark.parametrize("gpus", ["one", "split"])
def test_the_full_recipe_is_whole_without_models(gpus: str) -> None:
    full = with_overrides(recipe(gpus=gpus), [])  # type: ignore[arg-type]

    assert full.rollouts_per_step == 64
    assert (full.data.max_prompt_tokens, full.sampler.max_new_tokens) == (512, 1024)
    assert (full.sampler.device == full.learner.device) == (gpus == "one")
    run(RECIPE, "--show", "--set", f"gpus={gpus}")


def test_a_start_names_each_folder_that_is_missing_and_how_to_get_it(tmp_path: Path) -> None:
    said = run(RECIPE, "--set", f"models={tmp_path}", expect=2).stderr

    assert f"hf download Qwen/Qwen3-0.6B --local-dir {tmp_path}/Qwen3-0.6B" in said
    for name in ("train", "test"):
        assert f"{tmp_path}/gsm8k/main/{name}-00000-of-00001.parquet'" in said


@pytest.mark.slow
def test_the_tiny_profile_learns_with_the_torch_sampler(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--set", "profile=tiny", "--set", f"models={tmp_path}", "--set", "sampler.backend=hf", "--json")

    run(RECIPE, *options, "--out", str(out))

    first, last = map(json.loads, (out / "evaluations.jsonl").read_text().splitlines())
    assert last["kl"] < 0.8 * first["kl"]


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_tiny_models_are_the_same_bits_each_time_and_are_left_alone_when_they_are_there(
    tmp_path: Path, family: tiny_models.Family
) -> None:
    first, second = (tiny_models.make(family, tmp_path / name) for name in ("a", "b"))
    for path in sorted((tmp_path / "a").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes(), path
    (second.student / "config.json").write_text("changed")

    assert tiny_models.make(family, tmp_path / "b") == second
    assert (second.student / "config.json").read_text() == "changed"
    assert first.student != second.student
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
