"""The trace of real runs: one that ended, one that was killed and resumed, one that is still going on."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from tests.e2e.runs import (
    PATIENCE_S,
    ROOT,
    World,
    events,
    ledger_rows,
    run,
    start_run,
    wait_for,
)
from tests.support.traces import Trace


def trace(out: Path, target: Path) -> tuple[Trace, subprocess.CompletedProcess[str]]:
    done = subprocess.run(
        [sys.executable, "-m", "engine.trace", str(out), "-o", str(target)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Trace.read(target), done


def journeys(shown: Trace) -> list[list[str]]:
    return [[slice_["name"] for slice_ in slices] for slices in shown.arrows.values()]


def test_the_trace_of_a_run_shows_every_rollout_on_its_way_into_training(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(world.recipe(tmp_path / "r.py"), "--out", str(out), "--json")

    shown, done = trace(out, tmp_path / "trace.json")

    spans = [line for line in events(out) if line.get("kind") == "span"]
    assert len([e for e in shown.slices if e["cat"] != "wait"]) == len(spans)
    assert f"{len(spans)} spans, 24 rollouts, 1 process" in done.stdout
    assert done.stderr == ""
    complete = [names for names in journeys(shown) if len(names) == 3]
    assert complete == [["sampler.rollout", "teacher.score", "learner.micro_batch"]] * 24
    assert [e["name"] for e in shown.on("weight versions")] == [f"version {v}" for v in range(1, 7)]
    assert len(shown.named("loss", "C")) >= 5
    assert shown.named("staleness (versions)", "C")
    for actor in ("sampler", "teacher_proxy", "learner", "weight_syncer"):
        assert shown.lanes(actor), actor
    assert {e["name"] for e in shown.on("learner waits")} <= {"no input", "no room", "version not live"}
    assert shown.on("weight_syncer waits"), "it waits for versions most of the time"
    # The learner does one thing at a time, so nothing of it can need a second lane.
    assert shown.lanes("learner") == ["learner"]


def test_a_run_that_goes_on_is_killed_and_resumed_is_one_trace_at_any_time(world: World, tmp_path: Path) -> None:
    recipe, out = world.recipe(tmp_path / "r.py"), tmp_path / "out"
    process = start_run(recipe, "--out", str(out), "--json", "--set", "steps=400")
    try:
        wait_for(out, "learner.step", process=process, step=3)
        live, _ = trace(out, tmp_path / "live.json")
        assert process.poll() is None, "it was looked at while it went on"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=PATIENCE_S)
    with (out / "events.jsonl").open("ab") as log:
        log.write(b'{"t":"2026-01-02T03:0')  # as if it had been killed inside a write
    steps = max(line["step"] for line in events(out) if line["event"] == "learner.step") + 2

    _, killed = trace(out, tmp_path / "killed.json")
    run(recipe, "--resume", "--out", str(out), "--json", "--set", f"steps={steps}")
    shown, resumed = trace(out, tmp_path / "trace.json")

    assert len(live.named("learner.step")) >= 3
    assert live.arrows
    assert "the last line is not complete" in killed.stderr
    assert "left out (the first is line" in resumed.stderr
    assert list(shown.processes.values()) == ["node 0"]
    _, opened_again = sorted(e["ts"] for e in shown.named("log.opened", "i"))
    trained = [row for row in ledger_rows(out) if row["state"] == "trained"]
    assert len(trained) == 4 * steps
    micro_batches = [slices[-1] for slices in shown.arrows.values() if slices[-1]["name"] == "learner.micro_batch"]
    assert len(micro_batches) >= len(trained)
    assert {e["ts"] > opened_again for e in micro_batches} == {True, False}
    assert not [e for e in shown.slices if e["ts"] < opened_again < e["ts"] + e["dur"]], "nothing reaches over the gap"
