"""The recipe with a user's own actor in docs/recipes.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

from tests.e2e.runs import ROOT, World, ledger_rows, run


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
