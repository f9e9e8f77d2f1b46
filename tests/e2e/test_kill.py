"""SIGKILL at moments that nobody chose: training happens once, and deterministic runs end in the same bits."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest

from tests.e2e.runs import (
    PATIENCE_S,
    World,
    assert_exactly_once,
    events,
    finish,
    free_port,
    run,
    start_run,
    start_teacher,
    teacher_process,
    wait_for,
    wait_ready,
    weights_digest,
)

KILLS = 5


def run_with_kills(recipe: Path, out: Path, *arguments: str, seed: int) -> int:
    """Kill the run up to ``KILLS`` times and let it finish; returns how often there was something to kill.

    The moments are counted in lines of its log, not in seconds, so that every stage of a step gets its share whatever
    the speed of the machine.
    """
    draw = random.Random(seed)
    killed = 0
    for _ in range(KILLS):
        process = start_run(recipe, "--resume", "--out", str(out), *arguments)
        wait_for_lines(out, process, len(events(out)) + draw.randint(1, 60))
        if process.poll() is None:
            process.kill()
            killed += 1
        process.communicate(timeout=PATIENCE_S)
    run(recipe, "--resume", "--out", str(out), *arguments)
    return killed


def wait_for_lines(out: Path, process: subprocess.Popen[str], count: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and len(events(out)) < count:
        assert time.monotonic() < deadline, f"the run stopped writing before line {count}"
        time.sleep(0.005)  # another process has no event to wait for


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_deterministic_run_killed_again_and_again_ends_in_the_same_bits(
    world: World, tmp_path: Path, seed: int
) -> None:
    recipe = world.recipe(tmp_path / "r.py")
    arguments = ("--set", "max_staleness=0", "--set", "deterministic=true", "--json")
    run(recipe, "--out", str(tmp_path / "quiet"), *arguments)
    killed = run_with_kills(recipe, tmp_path / "killed", *arguments, seed=seed)

    assert killed > 0
    assert weights_digest(tmp_path / "killed", 6) == weights_digest(tmp_path / "quiet", 6)
    assert_exactly_once(tmp_path / "killed", steps=6, per_step=4, max_staleness=0)


@pytest.mark.slow
def test_an_asynchronous_run_killed_again_and_again_trains_every_occurrence_once(world: World, tmp_path: Path) -> None:
    recipe = world.recipe(tmp_path / "r.py")
    killed = run_with_kills(recipe, tmp_path / "out", "--set", "max_staleness=2", "--json", seed=3)

    assert killed > 0
    assert_exactly_once(tmp_path / "out", steps=6, per_step=4, max_staleness=2)


def test_a_teacher_that_is_killed_and_comes_back_costs_nothing_but_time(world: World, tmp_path: Path) -> None:
    port, out = free_port(), tmp_path / "out"
    recipe = world.recipe(tmp_path / "r.py", urls=(f"http://127.0.0.1:{port}",))
    with teacher_process(world, port) as teacher:
        process = start_run(recipe, "--out", str(out), "--json")
        wait_for(out, "learner.step", process=process, step=2)
        teacher.send_signal(signal.SIGKILL)
        teacher.wait()
        wait_for(out, "teacher.parked", process=process)
        assert process.poll() is None, "the run waits"
        again = start_teacher(world, port)
        try:
            wait_ready(port, again)
            finished = finish(process)
        finally:
            again.kill()
            again.wait()

    assert finished.code == 0, finished.stderr[-3000:]
    names = [line["event"] for line in events(out)]
    assert "teacher.parked" in names
    assert "teacher.resumed" in names
    assert_exactly_once(out, steps=6, per_step=4, max_staleness=1)


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains_checkpoints_and_leaves_a_run_that_goes_on(
    world: World, tmp_path: Path, name: signal.Signals
) -> None:
    recipe, out = world.recipe(tmp_path / "r.py"), tmp_path / "out"
    process = start_run(recipe, "--out", str(out), "--set", "steps=400", "--set", "checkpoint.every_steps=0")
    wait_for(out, "learner.step", process=process, step=3)
    process.send_signal(name)
    stopped = finish(process)

    assert stopped.code == 3, stopped.stderr[-3000:]
    assert "--resume" in stopped.stderr
    done = max(line["step"] for line in events(out) if line["event"] == "learner.step")
    assert (out / "checkpoints" / f"step_{done:06d}" / "student" / "config.json").exists()
    run(recipe, "--resume", "--out", str(out), "--json", "--set", f"steps={done + 2}")
    assert_exactly_once(out, steps=done + 2, per_step=4, max_staleness=1)


def test_a_second_signal_stops_at_once(world: World, tmp_path: Path) -> None:
    process, out, resume_teacher = start_run_that_waits_for_its_teacher(world, tmp_path, "--set", "node.grace_s=600")
    with resume_teacher:
        process.send_signal(signal.SIGTERM)
        wait_for(out, "run.draining", process=process)
        process.send_signal(signal.SIGTERM)
        finished = finish(process)

    assert finished.code == 143
    assert finished.stderr.endswith(f"stopped at once by SIGTERM; continue with --resume --out {out}\n")


def test_after_its_grace_a_run_that_waits_for_its_teacher_ends(world: World, tmp_path: Path) -> None:
    process, out, resume_teacher = start_run_that_waits_for_its_teacher(world, tmp_path, "--set", "node.grace_s=0.2")
    with resume_teacher:
        process.send_signal(signal.SIGTERM)
        finished = finish(process)

    assert finished.code == 3, finished.stderr[-3000:]
    run(world.recipe(tmp_path / "again.py"), "--resume", "--out", str(out), "--json")
    assert_exactly_once(out, steps=6, per_step=4, max_staleness=1)


def start_run_that_waits_for_its_teacher(
    world: World, tmp_path: Path, *arguments: str
) -> tuple[subprocess.Popen[str], Path, AbstractContextManager[object]]:
    """A run whose first measurement hangs, because the teacher is stopped (SIGSTOP) as soon as the run has started."""
    port, out = free_port(), tmp_path / "out"
    recipe = world.recipe(tmp_path / "r.py", urls=(f"http://127.0.0.1:{port}",))
    with ExitStack() as stack:
        teacher = stack.enter_context(teacher_process(world, port))
        process = start_run(recipe, "--out", str(out), *arguments)
        wait_for(out, "run.started", process=process)
        teacher.send_signal(signal.SIGSTOP)
        wait_for(out, "eval.started", process=process)
        return process, out, stack.pop_all()


FLAKY = """
import engine.build.actors
from engine.actors.sampler import Sampler

_standard = recipe


class Flaky(Sampler):
    calls = 0

    async def _answer(self, prompt):
        Flaky.calls += 1
        if Flaky.calls in (11, 23):
            raise RuntimeError("the sampler trips")
        await super()._answer(prompt)


def recipe():
    engine.build.actors.Sampler = Flaky
    return _standard()
"""


def test_a_sampler_that_fails_is_started_again_while_versions_travel(world: World, tmp_path: Path) -> None:
    recipe, out = world.recipe(tmp_path / "r.py", more=FLAKY), tmp_path / "out"
    settings = ("--set", "steps=12", "--set", "max_staleness=2", "--set", "evaluation.every_steps=2")
    run(recipe, "--out", str(out), "--json", *settings)

    names = [line["event"] for line in events(out)]
    assert names.count("actor.restarted") == 2
    assert "rollout.requeued" in names
    assert_exactly_once(out, steps=12, per_step=4, max_staleness=2)


def test_a_backlog_at_a_teacher_that_is_away_does_not_outlive_the_grace(world: World, tmp_path: Path) -> None:
    port, out = free_port(), tmp_path / "out"
    recipe = world.recipe(tmp_path / "r.py", urls=(f"http://127.0.0.1:{port}",))
    settings = ("teacher.max_in_flight=1", "steps=400", "max_staleness=3", "node.grace_s=0.2")
    with teacher_process(world, port) as teacher:
        process = start_run(recipe, "--out", str(out), *(word for s in settings for word in ("--set", s)))
        wait_for(out, "learner.step", process=process, step=2)
        teacher.kill()
        wait_for(out, "teacher.parked", process=process)
        process.send_signal(signal.SIGTERM)
        stopped = finish(process)

    assert stopped.code == 3, stopped.stderr[-3000:]


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_run_began_is_one_line(world: World, tmp_path: Path, name: signal.Signals) -> None:
    # A recipe that says when it is being read: the process is somewhere between its start and the run's.
    ready = tmp_path / "ready"
    more = f"\nimport pathlib, time\npathlib.Path({str(ready)!r}).touch()\ntime.sleep(60)\n"
    process = start_run(world.recipe(tmp_path / "r.py", more=more), "--out", str(tmp_path / "out"))
    deadline = time.monotonic() + PATIENCE_S
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)  # another process has no event to wait for
    process.send_signal(name)
    stopped = finish(process)

    assert stopped.code == 128 + name
    assert stopped.stderr == f"stopped by {name.name}; nothing was under way\n"
    assert not (tmp_path / "out").exists()
