"""The recipes with a learner on Megatron: what can be said of them without GPUs, and Moonlight's tiny profile from end
to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.load_recipe import load_recipe
from engine.recipe import HttpTeacher, Recipe
from tests.e2e.runs import ROOT, assert_exactly_once, events, run

MOONLIGHT, QWEN3 = ROOT / "recipes/moonlight_dsv3.py", ROOT / "recipes/qwen3_megatron.py"


def loaded(path: Path, *assignments: str) -> Recipe:
    return load_recipe(path, list(assignments))[0]


def test_moonlight_is_the_references_setting() -> None:
    recipe = loaded(MOONLIGHT)
    layout, sampler = recipe.learner.megatron, recipe.sampler

    assert (layout.pipeline_parallel, layout.expert_parallel, layout.tensor_parallel) == (3, 2, 1)
    assert (layout.num_ranks, sampler.vllm.num_engines) == (6, 2)
    assert sampler.device == "cuda:6", "the devices after the ranks'"
    assert (recipe.rollouts_per_step, recipe.max_staleness) == (1024, 2)
    assert (sampler.max_new_tokens, sampler.temperature, sampler.top_p) == (2048, 1.0, 0.99)
    assert (recipe.learner.micro_batch_tokens, recipe.learner.lr) == (6000, 1e-6)
    # Two data-parallel shares of six passes each: a pipeline of three stages is full.
    assert recipe.learner.tokens_at_a_time == 6000 * 2 * 6


@pytest.mark.parametrize(("gpus", "ranks", "device"), [(1, 1, "cuda:0"), (2, 1, "cuda:1"), (8, 4, "cuda:4")])
def test_qwen3_divides_the_machine_between_learner_and_sampler(gpus: int, ranks: int, device: str) -> None:
    recipe = loaded(QWEN3, f"gpus={gpus}")

    assert (recipe.learner.megatron.num_ranks, recipe.sampler.vllm.num_engines) == (ranks, ranks)
    assert (recipe.learner.device, recipe.sampler.device) == ("cuda", device)
    assert recipe.learner.tokens_at_a_time == 16_384


def test_the_demo_differs_in_its_learner_alone() -> None:
    recipe = ROOT / "recipes/smollm2.py"
    torch, megatron = loaded(recipe), loaded(recipe, "trainer=megatron")

    changed: dict[str, Any] = {
        field: getattr(megatron.learner, field)
        for field in torch.learner.__struct_fields__
        if getattr(torch.learner, field) != getattr(megatron.learner, field)
    }
    assert changed.keys() == {"backend", "megatron"}


@pytest.mark.parametrize("recipe", [MOONLIGHT, QWEN3])
def test_a_start_names_what_is_missing(recipe: Path, tmp_path: Path) -> None:
    refused = run(recipe, "--set", f"models={tmp_path}", expect=2)

    assert f"error: student: student.path '{tmp_path}" in refused.stderr


def test_a_teacher_elsewhere_is_an_url_away() -> None:
    teacher = loaded(MOONLIGHT, "teacher_url=http://far:1234").teacher

    assert isinstance(teacher, HttpTeacher)
    assert teacher.urls == ("http://far:1234",)


@pytest.mark.slow
def test_moonlights_tiny_profile_learns_on_three_stages_and_two_halves_of_its_experts(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    out = tmp_path / "out"
    options = ("--set", "profile=tiny", "--set", f"models={tmp_path}", "--set", "sampler.backend=hf", "--json")

    run(MOONLIGHT, *options, "--out", str(out))

    assert next(line["num_ranks"] for line in events(out) if line["event"] == "ranks.started") == 6
    assert_exactly_once(out, steps=12, per_step=16, max_staleness=2)
    first, last = map(json.loads, (out / "evaluations.jsonl").read_text().splitlines())
    assert last["kl"] < 0.9 * first["kl"]
