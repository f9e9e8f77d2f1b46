"""The recipe with a user's own actor in docs/recipes.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

from tests.e2e.runs import ROOT, World, assert_exactly_once, ledger_rows, run


def block(name: str) -> str:
    """The code block of docs/recipes.md that begins with ``# name``."""
    text = (ROOT / "docs" / "recipes.md").read_text()
    blocks: list[str] = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    return next(code for code in blocks if code.startswith(f"# {name}"))


def test_the_documented_filter_is_short_and_runs(world: World, tmp_path: Path) -> None:
    code = block("length_filter.py")
    assert len(code.splitlines()) < 40
    path = tmp_path / "length_filter.py"
    path.write_text(code)
    settings = {
        "student.path": world.student,
        "teacher.model": world.teacher,
        "teacher.top_k": 16,
        "data.path": world.prompts,
        "data.max_prompt_tokens": 128,
        "rollouts_per_step": 4,
        # A hot sampler with many ways to stop: some answers are short.
        "sampler.max_new_tokens": 8,
        "sampler.stop_ids": list(range(0, 300, 3)),
        "sampler.num_slots": 4,
    }
    changes = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]

    assert "[length_filter]" in run(path, *changes, "--show").stdout
    run(path, *changes, "--out", str(tmp_path / "out"), "--json")

    rows = ledger_rows(tmp_path / "out")
    failed = [row for row in rows if row["state"] == "failed"]
    trained = [row for row in rows if row["state"] == "trained"]
    assert failed
    assert all(row["reason"] == "fewer than 4 tokens" for row in failed)
    assert len(trained) == 12
    assert min(row["num_tokens"] for row in trained) >= 4


CUSTOM = """
from engine.actor import Actor

_plain = recipe

class Mine(Actor):
    def __init__(self, ports):
        super().__init__(ports.name)
        self.input, self.output = ports.input, ports.output

    async def run(self):
        {body}

def recipe():
    return _plain(), lambda graph: graph.insert("mine", after="sampler", make=Mine)
"""


def test_an_actor_that_returns_early_ends_the_run_and_says_why(world: World, tmp_path: Path) -> None:
    recipe = world.recipe(tmp_path / "r.py", more=CUSTOM.format(body="return"))

    finished = run(recipe, "--out", str(tmp_path / "out"), expect=1)

    assert "actor 'mine' failed: RecipeError: its run() returned before 'rollouts' ended" in finished.stderr


def test_an_output_that_its_actor_forgot_to_close_is_closed_at_its_end(world: World, tmp_path: Path) -> None:
    body = "async for rollout in self.input:\n            await self.output.send(rollout)"
    recipe = world.recipe(tmp_path / "r.py", more=CUSTOM.format(body=body))

    run(recipe, "--out", str(tmp_path / "out"), "--json", "--set", "steps=2")

    assert_exactly_once(tmp_path / "out", steps=2, per_step=4, max_staleness=1)
