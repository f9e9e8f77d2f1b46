"""The tiny profile of ``recipes/qwen3.py`` with vLLM, from end to end; here only an adapter is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.e2e.runs import ROOT, events, run


@pytest.mark.slow
def test_a_run_that_trains_an_adapter_learns_and_leaves_a_student_that_loads(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(
        ROOT / "recipes" / "qwen3.py",
        *("--out", str(out), "--json", "--set", "profile=tiny", "--set", f"models={tmp_path}"),
        *("--set", 'learner.lora={"rank": 8}', "--set", "learner.lr=1e-2", "--set", "weights.verify_every=5"),
    )

    first, last = map(json.loads, (out / "evaluations.jsonl").read_text().splitlines())
    assert last["kl"] < 0.9 * first["kl"]
    verified = [line for line in events(out) if line["event"] == "weights.verified"]
    # The last version may come when nobody asks for answers any more.
    assert {line["version"] for line in verified} >= {5, 10, 15}
    assert max(line["difference"] for line in verified) < 1e-4
    checkpoint = out / "checkpoints" / "step_000020"
    assert (checkpoint / "adapter" / "adapter_model.safetensors").stat().st_size < 200_000
    AutoModelForCausalLM.from_pretrained(checkpoint / "student")
