"""The report of real runs: at their end, while they go on, after they were killed, when they failed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

from tests.e2e.runs import ROOT, World, environment, events, finish, run, start_run, wait_for


def report(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "engine.report", str(out), *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def markdown(out: Path) -> str:
    return (out / "report.md").read_text().replace("\\", "")


def test_a_run_writes_its_report_and_says_where(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finished = run(world.recipe(tmp_path / "r.py"), "--out", str(out), "--set", "learner.lr=0.004")

    assert finished.stdout.endswith(f"\nreport\n  {out}/report.html\n")
    assert json.loads((out / "summary.json").read_text())["report"] == str(out / "report.html")
    text = markdown(out)
    assert "The run finished after 6 of 6 steps." in text
    assert "| learner.lr | 0.004 | 0.00001 |" in text
    assert "--set learner.lr=0.004" in text
    kls = [line["kl"] for line in events(out) if line["event"] == "eval.run"]
    assert f"| KL, own answers | {kls[0]:.4g} | {kls[1]:.4g} |" in text
    losses = [line["loss"] for line in events(out) if line["event"] == "learner.step"]
    assert [f"| {step} | {loss:.4g} |" in text for step, loss in enumerate(losses, start=1)] == [True] * 6
    assert "\nNone.\n" in text.partition("## Faults met and survived")[2]
    assert f'from_pretrained("{out}/checkpoints/step_000006/student")' in text
    page = (out / "report.html").read_text()
    assert page.count("<figure>") == 6

    again = report(out)
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout == f"report: {out}/report.html and {out}/report.md\n"
    assert (out / "report.html").read_text() == page, "the same log makes the same page"


def test_a_killed_run_and_its_resumption(world: World, tmp_path: Path) -> None:
    recipe, out = world.recipe(tmp_path / "r.py"), tmp_path / "out"
    process = start_run(recipe, "--out", str(out), "--set", "steps=400", "--set", "checkpoint.every_steps=3")
    wait_for(out, "learner.step", process=process, step=5)
    assert report(out).returncode == 0
    assert "The run is going on (" in markdown(out)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert report(out).returncode == 0
    assert "The run was killed after " in markdown(out)
    done = max(line["step"] for line in events(out) if line["event"] == "learner.step") + 2
    run(recipe, "--resume", "--out", str(out), "--set", f"steps={done}")

    text = markdown(out)
    assert f"The run finished after {done} of {done} steps." in text
    assert re.search(r"\| process killed \| 1 \| the run went on after step \d+ \|", text)
    assert "2 processes" in text
    assert "resumed: at step" in text
    trained = re.search(r"\| tokens trained on \| [\d,]+ \| ([\d,]+) rollouts \|", text)
    assert trained is not None
    assert int(trained[1].replace(",", "")) == 4 * done, "steps that were trained twice count once"


def test_a_run_that_fails_has_a_report_too(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    broken = "\n".join(
        (
            "",
            "import engine.build.actors",
            "from engine.actors.sampler import Sampler",
            "_standard = recipe",
            "class Broken(Sampler):",
            "    async def _answer(self, prompt):",
            "        raise RuntimeError('the sampler trips')",
            "def recipe():",
            "    engine.build.actors.Sampler = Broken",
            "    return _standard()",
        )
    )
    failed = finish(start_run(world.recipe(tmp_path / "r.py", more=broken), "--out", str(out)))

    assert failed.code == 1
    assert f"report: {out}/report.html\n" in failed.stderr
    text = markdown(out)
    assert "**The run failed after 0 of 6 steps: sampler: the sampler trips**" in text
    assert "No optimizer step was done." in text


def test_a_report_that_cannot_be_written_is_no_failure_of_the_run(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "report.html").mkdir(parents=True)
    finished = run(world.recipe(tmp_path / "r.py"), "--out", str(out), "--json")

    assert finished.json()["report"] is None
    assert finished.stderr.count("the report could not be written") == 1
    assert [line["level"] for line in events(out) if line["event"] == "report.failed"] == ["warning"]


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path) -> None:
    done = report(tmp_path)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {tmp_path} holds no log of a run")
