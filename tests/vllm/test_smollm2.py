"""``recipes/smollm2_vllm.py`` as its docstring says, shorter: vLLM answers, vLLM scores, and the student learns."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.runs import ROOT, environment, finish, free_port, start_run, wait_for, wait_ready

MODELS = ROOT / "models" / "smollm2"
STEPS = 6
MOST_BYTES = 12 << 30


def peak_bytes(pid: int) -> int:
    """Of a process and all that it has started; what they share counts in each."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task").glob("*/children")
        below = [int(child) for path in children for child in path.read_text().split()]
    except FileNotFoundError:  # it has ended meanwhile
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return (int(found[1]) * 1024 if found else 0) + sum(map(peak_bytes, below))


@pytest.mark.slow
@pytest.mark.skipif(not (MODELS / "student" / "config.json").is_file(), reason="needs the demo's models: make models")
def test_with_vllm_on_both_sides_the_held_out_divergence_falls(tmp_path: Path) -> None:
    port, out = free_port(), tmp_path / "out"
    teacher = subprocess.Popen(
        [
            *(sys.executable, "-m", "teacher", "--backend", "vllm", "--model", str(MODELS / "teacher")),
            *("--port", str(port), "--max-length", "128", "--kv-cache-bytes", str(128 << 20), "--num-threads", "1"),
        ],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_ready(port, teacher)
        run = start_run(
            ROOT / "recipes" / "smollm2_vllm.py",
            "--out", str(out),
            "--json",
            "--set", f"steps={STEPS}",
            "--set", f'teacher.urls=["http://127.0.0.1:{port}"]',
            "--set", "sampler.max_new_tokens=24",
            "--set", "weights.verify_every=2",
            "--set", "evaluation.data.num_rows=8",
            "--set", "evaluation.samples_per_prompt=1",
            "--set", "checkpoint.every_steps=0",
        )  # fmt: skip
        wait_for(out, "learner.step", process=run, step=STEPS)
        memory = peak_bytes(run.pid) + peak_bytes(teacher.pid)
        finished = finish(run)
    finally:
        teacher.kill()
        teacher.wait()

    assert finished.code == 0, finished.stderr[-6000:]
    measured = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    assert [one["version"] for one in measured] == [0, STEPS]
    assert measured[1]["kl"] < 0.85 * measured[0]["kl"]
    assert memory < MOST_BYTES, f"{memory / 2**30:.1f} GiB"
