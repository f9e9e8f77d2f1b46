"""The whole loop in a real process, with a teacher in the same process and with one behind HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.runs import (
    ROOT,
    World,
    assert_exactly_once,
    environment,
    events,
    free_port,
    run,
    teacher_process,
    weights_digest,
)

LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("Tell me", return_tensors="pt")
assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[0] == 1
"""


def test_a_run_ends_with_a_summary_a_checkpoint_that_loads_and_a_ledger_that_proves_it(
    world: World, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    finished = run(world.recipe(tmp_path / "r.py"), "--out", str(out), "--json")

    summary = finished.json()
    assert json.loads((out / "summary.json").read_text()) == summary
    assert_exactly_once(out, steps=6, per_step=4, max_staleness=1)
    log = events(out)
    names = {line["event"] for line in log}
    assert {"run.started", "learner.step", "weights.live", "eval.run", "checkpoint.save", "run.finished"} <= names
    told = [line for line in log if line["event"] == "answer.trained"]
    assert [line["step"] for line in told] == [1, 2, 3, 4, 5, 6]
    assert all(len(line["pieces"]) == len(line["divergences"]) == line["num_tokens"] for line in told)
    kls = [line["kl"] for line in log if line["event"] == "eval.run"]
    assert len(kls) == 2
    assert kls[1] < kls[0], "the student came closer to the teacher"
    student = out / "checkpoints" / "step_000006" / "student"
    subprocess.run([sys.executable, "-c", LOAD, str(student)], check=True, env=environment(), cwd=ROOT)


def test_the_same_recipe_with_the_teacher_behind_http(world: World, tmp_path: Path) -> None:
    port = free_port()
    recipe = world.recipe(tmp_path / "r.py", urls=(f"http://127.0.0.1:{port}",))
    with teacher_process(world, port):
        run(recipe, "--out", str(tmp_path / "out"), "--json")

    assert_exactly_once(tmp_path / "out", steps=6, per_step=4, max_staleness=1)


def test_two_deterministic_runs_end_in_the_same_bits(world: World, tmp_path: Path) -> None:
    recipe = world.recipe(tmp_path / "r.py")
    digests = []
    for name in ("a", "b"):
        run(recipe, "--set", "max_staleness=0", "--set", "deterministic=true", "--out", str(tmp_path / name), "--json")
        digests.append(weights_digest(tmp_path / name, 6))

    assert digests[0] == digests[1]


@pytest.mark.parametrize(("terminal", "is_live"), [("xterm-256color", True), ("dumb", False)])
def test_a_terminal_shows_a_picture_and_one_that_cannot_move_its_cursor_lines(
    world: World, tmp_path: Path, terminal: str, is_live: bool
) -> None:
    recipe, (ours, theirs) = world.recipe(tmp_path / "r.py"), os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "engine.run", str(recipe), "--out", str(tmp_path / "o"), "--set", "steps=3"],
        cwd=ROOT,
        env={**environment(), "TERM": terminal, "COLUMNS": "100"},
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b"".join(_chunks(ours))
    os.close(ours)

    assert process.wait() == 0
    assert (b"\x1b[?25l" in shown) == is_live  # the cursor is hidden
    assert shown.count(b"\x1b[?25h") == int(is_live)  # and shown again
    assert (b"step 1/3  loss" in shown) != is_live


def _chunks(terminal: int) -> Iterator[bytes]:
    """What is written to the terminal until its last writer is gone."""
    while True:
        try:
            chunk = os.read(terminal, 1 << 16)
        except OSError:  # how Linux says that
            return
        if not chunk:
            return
        yield chunk
