"""The demo itself, shortened: the real models, the teacher in its own process, the launcher of ``make demo``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.smollm2 import recipe
from tests.e2e.runs import ROOT, assert_exactly_once, free_port

STEPS = 6


@pytest.mark.slow
def test_a_few_steps_bring_the_pruned_student_closer_to_its_teacher(tmp_path: Path) -> None:
    if not (ROOT / "models" / "smollm2" / "held_out.jsonl").exists():
        pytest.skip("needs the demo's models: make models")
    out = tmp_path / "out"
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "recipes.demo", "--port", str(free_port()), "--out", str(out)),
            *("--set", f"steps={STEPS}", "--set", "evaluation.data.num_rows=8", "--set", "checkpoint.every_steps=0"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )

    assert launched.returncode == 0, launched.stdout[-3000:] + launched.stderr[-3000:]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["kl"]["after"] < 0.9 * summary["kl"]["before"]
    assert summary["reference_nll"]["after"] < summary["reference_nll"]["before"]
    assert_exactly_once(out, steps=STEPS, per_step=8, max_staleness=recipe().max_staleness)
    assert "held-out KL to the teacher" in launched.stdout
