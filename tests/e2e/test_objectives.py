"""What the student found most likely reaches the teacher and comes back as a loss, over HTTP and through all actors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.runs import World, assert_exactly_once, events, free_port, run, teacher_process

TERMS = [
    {"kind": "student_topk_reverse_kl", "k": 12, "weight": 0.5},
    {"kind": "sampled_reverse_kl", "clip_ratio": 2.0, "weight": 0.1},
    {"kind": "jsd", "beta": 0.5, "weight": 0.4},
]


def test_a_mixture_of_all_kinds_of_support_trains_and_resumes(world: World, tmp_path: Path) -> None:
    port = free_port()
    recipe, out = world.recipe(tmp_path / "r.py", urls=(f"http://127.0.0.1:{port}",)), tmp_path / "out"
    mixture = ["--set", "objective.kind=mixture", "--set", f"objective.terms={json.dumps(TERMS)}"]
    with teacher_process(world, port):
        run(recipe, *mixture, "--set", "steps=2", "--out", str(out), "--json")
        run(recipe, *mixture, "--resume", "--out", str(out), "--json")

    assert_exactly_once(out, steps=6, per_step=4, max_staleness=1)
    log = events(out)
    kls = [line["kl"] for line in log if line["event"] == "eval.run"]
    assert kls[-1] < kls[0]
    steps = [line for line in log if line["event"] == "learner.step"]
    assert all(0 < line["student_mass"] <= 1 and 0 <= line["topk_overlap"] <= 1 for line in steps)


@pytest.mark.parametrize("top_k", [1, 384])
def test_one_teacher_id_and_all_of_them_train(world: World, tmp_path: Path, top_k: int) -> None:
    out = tmp_path / "out"

    run(world.recipe(tmp_path / "r.py"), "--set", f"teacher.top_k={top_k}", "--out", str(out), "--json")

    assert_exactly_once(out, steps=6, per_step=4, max_staleness=1)
